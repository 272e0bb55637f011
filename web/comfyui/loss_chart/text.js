/** Words and numbers of the chart. */

/** @import { Curve } from "./curve.js" */

/** @param {number} loss */
export function formatLoss(loss) {
  return loss !== 0 && Math.abs(loss) < 1e-3 ? loss.toExponential(2) : String(Number(loss.toPrecision(3)));
}

/** @param {number} seconds */
export function formatDuration(seconds) {
  const whole = Math.ceil(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/**
 * Where the run is, for the line above the chart: [phase and step, loss, time left].
 *
 * @param {Curve | undefined} curve
 * @returns {string[]}
 */
export function statusOf(curve) {
  if (!curve?.now) return ["The loss of the next run appears here."];
  const { phase, step, total, seconds_left: left } = curve.now;
  const parts = [curve.stopped ? `${phase}: stopped at ${step} of ${total}` : `${phase}: ${step} of ${total}`];
  const last = curve.points.at(-1);
  if (last) parts.push(`loss ${formatLoss(last.smooth)}`);
  if (!curve.stopped && step < total && Number.isFinite(left)) parts.push(`${formatDuration(left)} left`);
  return parts;
}

/**
 * The chart in words.
 *
 * @param {Curve | undefined} curve
 */
export function describe(curve) {
  const status = statusOf(curve).join(", ");
  const first = curve?.points[0];
  return first ? `Loss chart. ${status}; it began at ${formatLoss(first.loss)}.` : `Loss chart. ${status}`;
}
