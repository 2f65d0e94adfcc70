// Colour maps that every eye can tell apart: by their anchors, as 256 colours.

const anchors = {
  viridis: ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"],
  magma: ["000004", "1d1147", "51127c", "832681", "b73779", "e75263", "fc8961", "fec488", "fcfdbf"],
  inferno: ["000004", "210c4a", "56106e", "89226a", "bb3654", "e35932", "f98c0a", "f9c932", "fcffa4"],
  cividis: ["00204d", "00336f", "39486b", "575d6d", "707173", "8a8779", "a69d75", "c4b56c", "e4cf5b", "ffea46"],
  grey: ["101010", "f2f2f2"],
  "grey, reversed": ["f2f2f2", "101010"],
};

const numbers = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));

export const names = Object.keys(anchors);

// 256 colours, [256 * 4] bytes.
export function ramp(name) {
  const stops = anchors[name].map(numbers);
  const bytes = new Uint8Array(1024);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const before = Math.min(Math.floor(at), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      bytes[4 * i + c] = Math.round(stops[before][c] + (at - before) * (stops[before + 1][c] - stops[before][c]));
    }
    bytes[4 * i + 3] = 255;
  }
  return bytes;
}

export const two = ["#e6399b", "#2bb673"]; // of two genes as two colours; where both are high they add up to near white
export const ofRegions = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"]; // Okabe and Ito
