/**
 * Front-end extension: a live loss chart with before and after pictures on the Ablate Concept node.
 *
 * Fed by the server's websocket event "concept_ablation.progress". Where the front end lacks something that this needs,
 * the node stays as it is (its outputs still hold the loss plot) and the console says so once.
 */

import { advance, newCurve, stop } from "./loss_chart/curve.js";
import { createView } from "./loss_chart/view.js";

/** @import { Curve } from "./loss_chart/curve.js" */
/** @import { View } from "./loss_chart/view.js" */

const NODE = "ConceptAblationAblate";
const PROGRESS = "concept_ablation.progress";
const ENDED = ["execution_interrupted", "execution_error"];

/**
 * The last run of each node, by graph and node id: undo and a change of tab make new node objects for the same node.
 * @type {Map<string, Curve>}
 */
const curves = new Map();
/** @type {WeakMap<object, View>} */
const views = new WeakMap();
let warned = false;
/**
 * Id of the workflow that runs, where its events say it: node 5 of another one that is open must not show its curve.
 * Errors and interruptions do not say it.
 * @type {string | undefined}
 */
let running;

try {
  const [{ app }, { api }] = await Promise.all([import("../../scripts/app.js"), import("../../scripts/api.js")]);
  app.registerExtension({
    name: "concept_ablation.loss_chart",
    nodeCreated: guarded((node) => {
      if (node.comfyClass === NODE) addChart(node);
    }),
  });
  api.addEventListener(
    PROGRESS,
    guarded(({ detail }) => {
      running = detail.workflow;
      update(app, detail.node, (curve) => advance(curve, detail));
    }),
  );
  for (const type of ENDED) {
    api.addEventListener(
      type,
      guarded(({ detail }) => update(app, detail.node_id, stop)),
    );
  }
} catch (error) {
  warn(error);
}

/** Adds the chart to a node that was just made; it has no id and no graph yet. */
function addChart(node) {
  const view = createView(() => curves.get(keyOf(node)));
  const widget = node.addDOMWidget("loss_chart", "concept_ablation_loss_chart", view.element, {
    serialize: false,
    getMinHeight: () => view.minHeight(),
  });
  // the option keeps the widget out of the prompt, the property out of the saved workflow
  widget.serialize = false;
  // nothing to click: the node can be dragged and the graph zoomed through it
  widget.disabled = true;
  // the server's preview pictures show the same curve, for front ends without this chart
  node.onDrawBackground = undefined;
  views.set(node, view);
}

/**
 * Brings the curve of a running node forward and shows it.
 *
 * @param {any} app
 * @param {string | number} id execution id: "3", or "12:3" for node 3 in the subgraph of node 12
 * @param {(curve: Curve) => Curve} change
 */
function update(app, id, change) {
  const graph = app.rootGraph ?? app.graph;
  if (running && graph?.id && running !== graph.id) return;
  const node = findNode(graph, String(id).split(":"));
  if (node?.comfyClass !== NODE) return;
  const key = keyOf(node);
  curves.set(key, change(curves.get(key) ?? newCurve()));
  views.get(node)?.show();
  // the front end grows a node for its widgets too, but may not draw it again afterwards
  node.expandToFitContent?.();
  node.setDirtyCanvas(true, true);
}

/**
 * The node at the end of a path of ids through subgraphs, or nothing where another workflow is open.
 *
 * @param {any} graph
 * @param {string[]} path
 */
function findNode(graph, path) {
  const node = graph?.getNodeById(path[0]);
  return node && path.length > 1 ? findNode(node.subgraph, path.slice(1)) : node;
}

/** A name for a node that outlives the object and differs between workflows. */
function keyOf(node) {
  return `${node.graph?.id}:${node.id}`;
}

/** `action`, whose errors are the chart's problem and nobody else's. */
function guarded(action) {
  return (argument) => {
    try {
      action(argument);
    } catch (error) {
      warn(error);
    }
  };
}

function warn(error) {
  if (warned) return;
  warned = true;
  console.warn("Concept Ablation: this front end cannot show the loss chart.", error);
}
