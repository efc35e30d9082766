"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const zooms = matchMedia("(pointer: fine)").matches; // on a phone, a drag scrolls the page

  function layoutOf(figure, width) {
    const style = getComputedStyle(document.documentElement);
    const [text, grid] = ["--text", "--grid"].map((name) => style.getPropertyValue(name).trim());
    const axis = { automargin: true, gridcolor: grid, linecolor: grid, zerolinecolor: grid, fixedrange: !zooms };
    const given = figure.layout;
    const heatmap = figure.data[0].type === "heatmap";
    return {
      ...given,
      height: figure.height,
      dragmode: zooms ? "zoom" : false,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, family: "system-ui, sans-serif", size: width < 480 ? 11 : 12 },
      margin: { l: 48, r: 12, t: heatmap ? 32 : 12, b: 40 },
      legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", itemsizing: "constant" },
      xaxis: { ...axis, ...given.xaxis, showgrid: !heatmap },
      yaxis: { ...axis, ...given.yaxis, showgrid: !heatmap },
      shapes: (given.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: text } })),
    };
  }

  function draw() {
    for (const figure of figures) {
      const element = document.getElementById(figure.id);
      const layout = layoutOf(figure, element.clientWidth);
      Plotly.react(element, figure.data, layout, { displayModeBar: false, responsive: true });
    }
  }

  draw();
  dark.addEventListener("change", draw);
  document.documentElement.dataset.drawn = "true";
})();
