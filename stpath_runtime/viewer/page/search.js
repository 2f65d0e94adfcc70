// Names of genes, offered while one types.

import { by, guarded } from "./state.js";

// find(text) gives names; take(name) and clear() are told what was chosen, or that the field is empty now.
export function completion(input, { find, take, clear }) {
  const list = by("found");
  let turn = 0, chosen = -1;

  function close() {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    chosen = -1;
  }

  function choose(name) {
    close();
    take(name);
  }

  function option(name) {
    const item = document.createElement("li");
    item.textContent = name;
    item.setAttribute("role", "option");
    item.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(name); });
    return item;
  }

  const search = guarded(async () => {
    const own = ++turn;
    const text = input.value.trim();
    if (!text) { close(); return; }
    const found = await find(text);
    if (own !== turn || document.activeElement !== input) return;
    list.replaceChildren(...found.map(option));
    list.style.top = `${input.offsetTop + input.offsetHeight}px`;
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(found.length > 0));
    chosen = -1;
  });

  function move(step) {
    const items = [...list.children];
    if (!items.length || list.hidden) return;
    chosen = chosen < 0 ? (step > 0 ? 0 : items.length - 1) : (chosen + step + items.length) % items.length;
    items.forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
    items[chosen].scrollIntoView({ block: "nearest" });
  }

  // What is chosen; else the name that was typed, whatever its case; else the first that is offered.
  function enter() {
    turn++;
    const text = input.value.trim();
    if (!text) { clear(); return; }
    const names = list.hidden ? [] : [...list.children].map((item) => item.textContent);
    input.value = names[chosen] ?? names.find((name) => name.toLowerCase() === text.toLowerCase()) ?? names[0] ?? text;
    choose(input.value);
  }

  const keys = {
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    Enter: enter,
    Escape: () => { close(); input.blur(); },
  };
  input.addEventListener("input", search);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow") && keys[event.key]) event.preventDefault();
    keys[event.key]?.();
    event.stopPropagation();
  });
  input.addEventListener("search", () => { if (!input.value) clear(); });
}
