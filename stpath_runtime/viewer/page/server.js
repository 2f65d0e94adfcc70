// The numbers of a prediction, from the server that sent this page.

const token = new URLSearchParams(location.search).get("token") ?? "";

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { Authorization: `Bearer ${token}` } });
  } catch {
    throw new Error("The viewer has ended, or cannot be reached: start stpath view again.");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let said = text;
    try { said = JSON.parse(text).error; } catch { /* not one of ours */ }
    throw new Error(said || `The viewer answered ${answer.status}.`);
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();
const floats = async (path) => new Float32Array(await (await ask(path)).arrayBuffer());
const named = (name) => encodeURIComponent(name);

// The page works with the middles of the spots. Coordinates in the file may be their corners, so many pixels from those.
let offset = 0;
const moved = (polygon) => polygon.map((corner) => corner.map((n) => n - offset));

export const server = {
  info: async () => {
    const info = await json("api/info");
    offset = info.spot.offset;
    return info;
  },
  spots: async () => (await floats("api/spots")).map((n) => n + offset),
  spot: async (i) => (await json(`api/spot/${i}`)).name,
  search: (text, limit) => json(`api/genes?search=${named(text)}&limit=${limit}`),
  gene: (name) => floats(`api/gene/${named(name)}`),
  region: ({ polygon, against }) => json("api/region", {
    method: "POST", body: JSON.stringify({ polygon: moved(polygon), against: against ? { polygon: moved(against.polygon) } : "rest" }),
  }),
  alike: (name, top) => json(`api/coexpression/${named(name)}?top=${top}`),
  keepRegions: (regions) => json("api/regions", { method: "PUT", body: JSON.stringify(Object.fromEntries(Object.entries(regions).map(([name, part]) => [name, moved(part)]))) }),
  tile: async (level, x, y) => (await ask(`tile/${level}/${x}/${y}`)).blob(),
  table: async (genes) => (await ask(`api/export.csv?genes=${genes.map(named).join(",")}`)).blob(),
};
