/**
 * What the chart knows about a run: its losses, where it is, its pictures. Pure functions; nothing here draws.
 *
 * @typedef {{ before: string[], after: string[] }} Pictures data URIs
 *
 * @typedef {object} ProgressEvent as the server sends it
 * @property {string} phase
 * @property {number} step
 * @property {number} total
 * @property {number | null} seconds_left
 * @property {number | null} loss
 * @property {Pictures} [pictures]
 *
 * @typedef {{ step: number, loss: number, smooth: number }} Point
 *
 * @typedef {object} Curve
 * @property {Point[]} points
 * @property {number} total steps of the training
 * @property {ProgressEvent | null} now the last event
 * @property {Pictures | null} pictures
 * @property {boolean} stopped the run ended before its last step
 */

const TRAINING = "Training";
/** The smooth line forgets within this share of the run. */
const MEMORY = 0.05;

/** @returns {Curve} */
export function newCurve() {
  return { points: [], total: 0, now: null, pictures: null, stopped: false };
}

/**
 * The curve after one more event. A new training begins a new curve; until then the last one stays.
 *
 * @param {Curve} curve
 * @param {ProgressEvent} event
 * @returns {Curve}
 */
export function advance(curve, event) {
  const training = event.phase === TRAINING && Number.isFinite(event.loss);
  const start = training && beginsAnew(curve, event) ? newCurve() : curve;
  return {
    points: training ? withPoint(start.points, event) : start.points,
    total: training ? event.total : start.total,
    now: event,
    pictures: event.pictures ? onlyImages(event.pictures) : start.pictures,
    stopped: false,
  };
}

/**
 * The curve of a run that was cancelled or failed.
 *
 * @param {Curve} curve
 * @returns {Curve}
 */
export function stop(curve) {
  return { ...curve, stopped: curve.now !== null && curve.now.step < curve.now.total };
}

/** The server skips events when they come too fast, step 1 included: a step back is a new run as well. */
function beginsAnew(curve, event) {
  const last = curve.points.at(-1);
  return event.step === 1 || event.total !== curve.total || (last !== undefined && event.step < last.step);
}

/** @returns {Point[]} */
function withPoint(points, { step, total, loss }) {
  const earlier = points.filter((point) => point.step < step);
  const last = earlier.at(-1);
  // skipped steps count: what is remembered depends on how far apart the points are
  const kept = last ? Math.exp(-(step - last.step) / Math.max(1, MEMORY * total)) : 0;
  return [...earlier, { step, loss, smooth: last ? kept * last.smooth + (1 - kept) * loss : loss }];
}

/** @returns {Pictures} without anything that the browser would have to fetch from elsewhere */
function onlyImages({ before = [], after = [] }) {
  const embedded = (uri) => typeof uri === "string" && uri.startsWith("data:image/");
  return { before: before.filter(embedded), after: after.filter(embedded) };
}
