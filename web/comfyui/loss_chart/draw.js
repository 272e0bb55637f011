/** Draws a curve on a canvas: axes with round numbers, the losses faint, the smooth line bold. */

/** @import { Curve } from "./curve.js" */

/** @typedef {{ text: string, grid: string, line: string, font: string }} Theme CSS colours and a font family */
/** @typedef {{ left: number, top: number, right: number, bottom: number }} Area in CSS pixels */

const MARGIN = { left: 40, top: 18, right: 14, bottom: 20 };
/** Room for one label of an axis, in CSS pixels. */
const LABEL = { width: 64, height: 28 };

/**
 * @param {CanvasRenderingContext2D} context scaled to CSS pixels
 * @param {number} width of the canvas in CSS pixels
 * @param {number} height
 * @param {Curve | undefined} curve
 * @param {Theme} theme
 */
export function drawChart(context, width, height, curve, theme) {
  const area = { left: MARGIN.left, top: MARGIN.top, right: width - MARGIN.right, bottom: height - MARGIN.bottom };
  context.clearRect(0, 0, width, height);
  context.font = `10px ${theme.font}`;
  drawFrame(context, area, theme);
  if (!curve?.points.length || area.right <= area.left || area.bottom <= area.top) return;

  const { points, total } = curve;
  const largest = Math.max(...points.map(({ loss }) => loss)) || 1;
  const lossTick = roundDistance(largest, (area.bottom - area.top) / LABEL.height);
  const stepTick = Math.max(1, roundDistance(total, (area.right - area.left) / LABEL.width));
  const top = Math.ceil(largest / lossTick) * lossTick;
  const x = (step) => area.left + ((area.right - area.left) * step) / total;
  const y = (loss) => area.bottom - ((area.bottom - area.top) * loss) / top;

  drawLossTicks(context, area, upTo(top, lossTick), lossTick, y, theme);
  drawStepTicks(context, area, upTo(total, stepTick), x, theme);
  const line = (key) => points.map((point) => [x(point.step), y(point[key])]);
  drawLine(context, line("loss"), theme.line, 1, 0.4);
  drawLine(context, line("smooth"), theme.line, 2, 1);
}

function drawFrame(context, { left, top, right, bottom }, theme) {
  context.fillStyle = theme.text;
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.fillText("loss", 0, 10);
  context.fillText("step", 0, bottom + 15);
  stroke(context, theme.grid, 1, 1, [
    [left, top],
    [left, bottom],
    [right, bottom],
  ]);
}

function drawLossTicks(context, { left, right }, losses, distance, y, theme) {
  const decimals = Math.max(0, Math.ceil(-Math.log10(distance) - 1e-9));
  const written = (loss) => (decimals > 4 ? loss.toExponential(0) : loss.toFixed(decimals));
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const loss of losses) {
    context.fillText(loss ? written(loss) : "0", left - 6, y(loss));
    stroke(context, theme.grid, 1, 0.35, [
      [left, y(loss)],
      [right, y(loss)],
    ]);
  }
}

function drawStepTicks(context, { bottom }, steps, x, theme) {
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (const step of steps) {
    context.fillText(String(step), x(step), bottom + 15);
    stroke(context, theme.grid, 1, 1, [
      [x(step), bottom],
      [x(step), bottom + 4],
    ]);
  }
}

/** A line, or for a single point a dot. */
function drawLine(context, points, color, width, opacity) {
  stroke(context, color, width, opacity, points);
  const [x, y] = points.at(-1);
  context.globalAlpha = opacity;
  context.fillStyle = color;
  context.beginPath();
  context.arc(x, y, width, 0, 2 * Math.PI);
  context.fill();
  context.globalAlpha = 1;
}

function stroke(context, color, width, opacity, points) {
  context.globalAlpha = opacity;
  context.strokeStyle = color;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.stroke();
  context.globalAlpha = 1;
}

/** The 1, 2 or 5 times a power of ten that divides `range` into at most `count` parts. */
function roundDistance(range, count) {
  const least = range / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least * (1 - 1e-9));
}

/** 0, distance, 2 · distance, … up to `end`. */
function upTo(end, distance) {
  return Array.from({ length: Math.floor(end / distance + 1e-9) + 1 }, (_, index) => index * distance);
}
