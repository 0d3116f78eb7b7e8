// The colours of style.css for the pictures, and canvases that are as sharp as the screen.

const NAMES = ["ink", "soft", "line", "panel", "ground", "absent", "resident", "hits", "in_time", "late_hits", "misses", "pending",
  "wasted", "substituted", "other"];
let colours = null;
const dark = matchMedia("(prefers-color-scheme: dark)");

/** name -> colour, as the style sheet has it now. */
export function palette() {
  if (!colours) {
    const style = getComputedStyle(document.documentElement);
    colours = Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  return colours;
}

/** Call `draw` when light and dark change places. */
export function onTheme(draw) {
  dark.addEventListener("change", () => { colours = null; draw(); });
}

/** A context in CSS pixels, of the canvas as wide as it is shown. */
export function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const w = Math.round(width * ratio), h = Math.round(height * ratio);
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}
