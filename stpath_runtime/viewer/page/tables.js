// The named regions, the table of the chosen one's genes, and the genes that go with the shown one.

import { ofRegions as colours } from "./colours.js";
import { csv, save } from "./files.js";
import { by, guarded, state } from "./state.js";

export function tables({ source, draw, showGenes }) {
  let rows = [], sorted = { by: "effect", up: false }, alikeOf = null;

  function cell(row, text) {
    const made = row.insertCell();
    made.textContent = text;
    return made;
  }

  const number = (n) => (n === null ? "–" : n.toFixed(Math.abs(n) < 10 ? 3 : 1));

  function showTable() {
    const filter = by("filter").value.trim().toLowerCase();
    const size = (row) => (sorted.by === "name" ? row.name : sorted.by === "effect" && !sorted.up ? Math.abs(row.effect ?? 0) : row[sorted.by] ?? 0);
    const shown = rows.filter((row) => row.name.toLowerCase().includes(filter));
    shown.sort((a, b) => (size(a) < size(b) ? -1 : size(a) > size(b) ? 1 : 0) * (sorted.up ? 1 : -1));
    by("genes").replaceChildren(...shown.map((row) => {
      const line = document.createElement("tr");
      cell(line, row.name);
      for (const key of ["inside", "against", "difference", "effect"]) cell(line, number(row[key]));
      line.addEventListener("click", () => showGenes([row.name, ...state.genes.slice(1)]));
      return line;
    }));
    for (const head of document.querySelectorAll("th[data-by]")) {
      if (head.dataset.by === sorted.by) head.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }

  function showRegions() {
    by("regions").replaceChildren(...state.regions.map((region, i) => {
      const item = document.createElement("li");
      item.classList.toggle("chosen", i === state.chosen);
      const swatch = document.createElement("button");
      swatch.className = "swatch";
      swatch.style.background = region.colour;
      swatch.title = "Show its genes";
      swatch.addEventListener("click", () => choose(i));
      const name = document.createElement("input");
      name.value = region.name;
      name.setAttribute("aria-label", "name of the region");
      name.addEventListener("focus", () => { if (state.chosen !== i) choose(i, false); });
      name.addEventListener("change", () => { region.name = name.value.trim() || region.name; showRegions(); tell(); compare(); draw(); });
      const count = document.createElement("span");
      count.className = "quiet";
      count.textContent = region.spots === undefined ? "" : region.spots.toLocaleString("en");
      const remove = document.createElement("button");
      remove.textContent = "×";
      remove.title = "Remove it";
      remove.addEventListener("click", () => {
        state.regions.splice(i, 1);
        state.chosen = Math.min(state.chosen, state.regions.length - 1);
        state.against = "rest";
        showRegions();
        tell();
        compare();
        draw();
      });
      item.append(swatch, name, count, remove);
      return item;
    }));
    const others = state.regions.filter((_, i) => i !== state.chosen);
    by("against").replaceChildren(new Option("the rest", "rest"), ...others.map((region) => new Option(region.name, region.name)));
    by("against").value = others.some((region) => region.name === state.against) ? state.against : "rest";
    state.against = by("against").value;
  }

  // So that tables of spots name the regions, too; and how many spots each has.
  const tell = guarded(async () => {
    const counts = await source.keepRegions(Object.fromEntries(state.regions.map(({ name, polygon }) => [name, polygon])));
    for (const region of state.regions) region.spots = counts[region.name];
    return true;
  });

  const compare = guarded(async () => {
    const region = state.regions[state.chosen];
    by("region-warning").hidden = !region;
    if (!region) {
      rows = [];
      by("region-title").textContent = "Draw a region: its genes against the rest of the slide appear here.";
      showTable();
      return;
    }
    const other = state.regions.find((each) => each.name === state.against && each !== region);
    const found = await source.region({ polygon: region.polygon, against: other });
    if (state.regions[state.chosen] !== region) return;
    region.spots = found.spots;
    rows = found.genes;
    by("region-title").textContent = `${region.name}: ${found.spots.toLocaleString("en")} spots against ${found.against.toLocaleString("en")}`;
    showTable();
    return true;
  });

  async function choose(i, again = true) {
    state.chosen = i;
    if (again) showRegions();
    draw();
    await compare();
    if (again) showRegions();
  }

  async function add(polygon, name) {
    let number = state.regions.length + 1;
    while (state.regions.some((region) => region.name === `region ${number}`)) number++;
    state.regions.push({ name: name ?? `region ${number}`, polygon, colour: colours[state.regions.length % colours.length] });
    await tell();
    if (!name) await choose(state.regions.length - 1);
  }

  const showAlike = guarded(async (name) => {
    alikeOf = name;
    if (by("alike-panel").hidden || !name) return;
    const found = await source.alike(name, 50);
    if (alikeOf !== name) return;
    by("alike-title").textContent = `Pearson's r with ${name} over all spots`;
    by("alike").replaceChildren(...found.map((row) => {
      const line = document.createElement("tr");
      cell(line, row.name);
      cell(line, row.r.toFixed(3));
      line.addEventListener("click", () => showGenes([state.genes[0], row.name]));
      line.title = "Show it beside the gene";
      return line;
    }));
    return true;
  });

  for (const head of document.querySelectorAll("th[data-by]")) head.addEventListener("click", () => {
    sorted = { by: head.dataset.by, up: sorted.by === head.dataset.by ? !sorted.up : head.dataset.by === "name" };
    showTable();
  });
  by("filter").addEventListener("input", showTable);
  by("against").addEventListener("change", (event) => { state.against = event.target.value; compare(); draw(); });
  for (const button of document.querySelectorAll("[data-panel]")) button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-panel]")) other.setAttribute("aria-pressed", String(other === button));
    by("region-panel").hidden = button.dataset.panel !== "region";
    by("alike-panel").hidden = button.dataset.panel !== "alike";
    showAlike(state.genes[0]);
  });
  by("save-region").addEventListener("click", () => {
    const lines = rows.map((row) => [row.name, row.inside, row.against, row.difference, row.effect]);
    save(csv([["gene", "inside", "against", "difference", "effect"], ...lines]), "region.csv");
  });

  return {
    add,
    showAlike,
    restore: async (regions, chosen) => {
      for (const { name, polygon } of regions) if (Array.isArray(polygon)) await add(polygon, String(name));
      showRegions();
      if (chosen >= 0 && chosen < state.regions.length) await choose(chosen);
    },
  };
}
