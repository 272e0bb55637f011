/** The chart as a DOM element: a line of text, a canvas, and pictures once there are any. */

import { drawChart } from "./draw.js";
import { describe, statusOf } from "./text.js";

/** @import { Curve } from "./curve.js" */
/** @typedef {{ element: HTMLElement, show: () => void, minHeight: () => number }} View */

const CHART_HEIGHT = 180;
const PICTURES_HEIGHT = 130;
/** Bitmap pixels for each CSS pixel of the screen: the graph may be zoomed in. */
const SHARPNESS = 2;

/** Redraws each chart, by its element, when the theme changes. */
const redraws = new WeakMap();

/**
 * @param {() => Curve | undefined} curveOf what to show, asked for at each drawing
 * @returns {View}
 */
export function createView(curveOf) {
  addStyle();
  const status = make("div", "status");
  const canvas = make("canvas", "canvas");
  canvas.setAttribute("role", "img");
  const plot = make("div", "plot", canvas);
  const pictures = make("div", "pictures");
  pictures.hidden = true;
  const element = make("div", "chart", status, plot, pictures);
  // Nodes 2.0 gives free height to widgets with this class
  element.classList.add("widget-expands");
  let shown = null;

  const show = () => {
    const curve = curveOf();
    status.replaceChildren(...statusOf(curve).map((text) => make("span", "part", text)));
    canvas.setAttribute("aria-label", describe(curve));
    if (shown !== (curve?.pictures ?? null)) {
      shown = curve?.pictures ?? null;
      pictures.replaceChildren(...(shown ? pictureRows(shown) : []));
      pictures.hidden = !shown;
    }
    draw(canvas, plot, curve);
  };

  show();
  new ResizeObserver(show).observe(plot);
  redraws.set(element, show);
  return { element, show, minHeight: () => CHART_HEIGHT + (curveOf()?.pictures ? PICTURES_HEIGHT : 0) };
}

function draw(canvas, plot, curve) {
  const { clientWidth: width, clientHeight: height } = plot;
  if (!width || !height) return;
  const scale = SHARPNESS * window.devicePixelRatio;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(plot);
  const theme = {
    text: style.getPropertyValue("--concept-ablation-text"),
    grid: style.getPropertyValue("--concept-ablation-grid"),
    line: style.getPropertyValue("--concept-ablation-line"),
    font: style.fontFamily,
  };
  drawChart(context, width, height, curve, theme);
}

function pictureRows({ before, after }) {
  const row = (label, uris) => {
    const images = uris.map((uri, index) => {
      const image = make("img", "picture");
      image.src = uri;
      image.alt = `Picture ${index + 1} ${label} the ablation`;
      return image;
    });
    return make("div", "row", make("span", "label", label), ...images);
  };
  return [row("before", before), row("after", after)];
}

/**
 * An element with the class `concept-ablation-<name>`.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} name
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function make(tag, name, ...children) {
  const element = document.createElement(tag);
  element.className = `concept-ablation-${name}`;
  element.append(...children);
  return element;
}

/** Adds the style sheet, and the watch on the theme, which is set on the root element, once. */
function addStyle() {
  const id = "concept-ablation-style";
  if (document.getElementById(id)) return;
  const link = document.createElement("link");
  link.id = id;
  link.rel = "stylesheet";
  link.href = new URL("../loss_chart.css", import.meta.url).href;
  document.head.append(link);
  new MutationObserver(() => {
    for (const element of document.querySelectorAll(".concept-ablation-chart")) redraws.get(element)?.();
  }).observe(document.documentElement, { attributeFilter: ["class", "style"] });
}
