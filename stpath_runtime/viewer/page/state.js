// What is shown now, and the few helpers that every part of the page uses.

export const by = (id) => document.getElementById(id);

export const state = {
  genes: [], values: [], ranges: [], hand: null, percent: 1, ramp: "viridis", mode: "side", opacity: 0.85, marks: true,
  view: null, regions: [], chosen: -1, against: "rest", drawing: null, dark: matchMedia("(prefers-color-scheme: dark)").matches,
};

export function say(message) {
  by("message").textContent = message;
  by("message").hidden = !message;
}

// The same work, whose errors are shown; what it returns, if anything, clears the message.
export const guarded = (work) => async (...given) => {
  try { const done = await work(...given); if (done !== undefined) say(""); return done; } catch (error) { say(error.message); }
};
