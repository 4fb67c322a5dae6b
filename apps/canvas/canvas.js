// A circuit that can be clicked and moved: nodes with pictures, edges with weights.
// What Python gives is drawn; clicks and moves go back to it. Positions and the view stay where they are when
// elements come and go.

// as in the figures, distinct to colour-blind eyes; lighter on dark
const LIGHT = { excites: "#b2182b", inhibits: "#2166ac" }, DARK = { excites: "#ef8a62", inhibits: "#67a9cf" };

function themed(element) {
  const style = getComputedStyle(element);
  const of = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  const text = of("--st-text-color", "#31333f"), back = of("--st-background-color", "#ffffff");
  return { text, back, ...(dark(back) ? DARK : LIGHT) };
}

function dark(color) {
  const [r, g, b] = color.match(/\w\w/g).map((part) => parseInt(part, 16));
  return r + g + b < 384;
}

function styles(colors) {
  return [
    { selector: "node", style: {
      "label": "data(label)", "font-size": 8, "color": colors.text, "text-valign": "bottom", "text-margin-y": 3,
      "text-wrap": "wrap", "text-max-width": 76,
      "text-background-color": colors.back, "text-background-opacity": 0.75, "width": 46, "height": 46, "shape": "round-rectangle",
      "background-color": colors.back, "border-width": 1, "border-color": "#888888", "min-zoomed-font-size": 5 } },
    { selector: "node[?bare]", style: { "text-valign": "center", "text-margin-y": 0, "width": 78, "height": 26,
      "text-background-opacity": 0, "font-size": 10 } },
    { selector: "node[picture]", style: { "background-image": "data(picture)", "background-fit": "cover" } },
    { selector: "node[count]", style: { "shape": "round-hexagon", "border-width": 2 } },
    { selector: "node.row", style: {
      "width": 1, "height": 1, "border-width": 0, "background-opacity": 0, "label": "data(label)",
      "text-valign": "center", "text-halign": "left", "font-size": 12, "color": "#888888", "events": "no" } },
    { selector: "edge", style: {
      "width": "data(width)", "line-color": colors.excites, "target-arrow-color": colors.excites,
      "curve-style": "haystack", "line-opacity": 0.6 } },
    { selector: "edge[sum < 0]", style: { "line-color": colors.inhibits, "target-arrow-color": colors.inhibits } },
    { selector: "edge[?unsigned]", style: { "line-color": "#888888", "target-arrow-color": "#888888" } },
    { selector: "edge[?arrow]", style: { "curve-style": "bezier", "target-arrow-shape": "triangle", "arrow-scale": 0.7 } },
    // behind the arrow, where edges between the same nodes have parted
    { selector: "edge[way][?arrow]", style: {
      "target-label": "data(way)", "target-text-offset": "data(at)", "font-size": 8, "font-weight": "bold", "color": colors.text,
      "text-background-color": colors.back, "text-background-opacity": 0.85, "min-zoomed-font-size": 4 } },
    { selector: ":selected", style: { "border-width": 4, "border-color": "#E69F00", "line-opacity": 1, "z-index": 9 } },
    { selector: "edge:selected", style: { "overlay-color": "#E69F00", "overlay-opacity": 0.25, "overlay-padding": 3 } },
  ];
}

function elements(data) {
  const few = data.edges.length <= 150; // arrows are slow to draw where there are many
  const into = new Map(); // labels of edges into one node stand at different distances from it
  const at = (e) => { into.set(e.target, (into.get(e.target) ?? -1) + 1); return 16 + 11 * (into.get(e.target) % 4); };
  return [
    ...data.rows.map((r) => ({ group: "nodes", data: { id: "row " + r.id, label: r.label },
      position: { x: r.x, y: r.y }, classes: "row", selectable: false, grabbable: false })),
    ...data.nodes.map((n) => ({ group: "nodes", position: { x: n.x, y: n.y },
      data: { id: n.id, label: n.label, bare: n.bare, ...(n.picture && { picture: n.picture }), ...(n.count && { count: n.count }) } })),
    ...data.edges.map((e) => ({ group: "edges", data: { id: e.id, source: e.source, target: e.target,
      width: e.width, sum: e.sum, arrow: few, unsigned: e.unsigned, ...(e.way && { way: e.way, at: at(e) }) } })),
  ];
}

function update(cy, data) {
  const wanted = elements(data);
  const ids = new Set(wanted.map((e) => e.data.id));
  cy.batch(() => {
    cy.elements().filter((e) => !ids.has(e.id())).remove();
    for (const element of wanted) {
      const known = cy.getElementById(element.data.id);
      if (known.empty()) cy.add(element);
      else {
        if (known.scratch("made") !== JSON.stringify(element.data)) known.data(element.data);
        if (known.isNode() && !known.grabbed()) known.position(element.position);
      }
      cy.getElementById(element.data.id).scratch("made", JSON.stringify(element.data));
    }
    cy.elements(":selected").filter((e) => e.id() !== data.selected).unselect();
    if (data.selected) cy.getElementById(data.selected).select();
  });
}

export default function (component) {
  const { data, parentElement } = component;
  const box = parentElement.querySelector(".circuit-canvas");
  box.style.height = data.height + "px";
  let cy = box.cy;
  if (!cy) {
    cy = cytoscape({ container: box, wheelSensitivity: 0.3, minZoom: 0.05, maxZoom: 6,
      hideEdgesOnViewport: data.edges.length > 600, textureOnViewport: false, boxSelectionEnabled: false });
    box.cy = cy;
    new ResizeObserver(() => { cy.resize(); cy.fit(undefined, 24); }).observe(box);
    // the library remembers where on the screen its box is, and does not see what is drawn above it push it down
    for (const name of ["pointerdown", "wheel"])
      box.addEventListener(name, () => cy.renderer().invalidateContainerClientCoordsCache(), { capture: true, passive: true });
  }
  const tell = component.setTriggerValue;
  cy.off("tap dragfree"); // the functions of this call, not of an earlier one
  cy.on("tap", (event) => tell("tapped", event.target === cy ? "" : event.target.id()));
  cy.on("dragfree", "node", (event) => {
    const { x, y } = event.target.position();
    tell("moved", { id: event.target.id(), x, y });
  });
  const colors = themed(box);
  if (box.colors !== JSON.stringify(colors)) cy.style(styles(colors)); // slow: not for every click
  box.colors = JSON.stringify(colors);
  const first = cy.elements().empty();
  update(cy, data);
  if (first || box.layoutOf !== data.layout) cy.fit(undefined, 24);
  box.layoutOf = data.layout;
  parentElement.querySelector(".circuit-fit").onclick = () => cy.fit(undefined, 24);
  return () => {};
}
