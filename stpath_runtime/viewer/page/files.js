// What the page gives to save.

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Lines of cells as CSV. Names come from files: a spreadsheet must not take one for a formula.
export function csv(lines) {
  const quoted = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  const written = lines.map((line) => line.map((cell) => (typeof cell === "string" ? quoted(cell) : cell ?? "")).join(","));
  return new Blob([written.join("\n") + "\n"], { type: "text/csv" });
}
