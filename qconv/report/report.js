"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { displayModeBar: false, responsive: true };
  const floor = -10; // dB; what lies lower is as useless
  const decibel = (value) => (value === null ? "equal" : `${value.toFixed(1)} dB`);
  const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
  // plotly takes names for a kind of HTML
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const middle = (text, most) =>
    text.length <= most ? text : `${text.slice(0, most / 3)}…${text.slice(text.length - (2 * most) / 3 + 1)}`;
  const rounded = (value) => String(Number(value.toPrecision(4)));
  let picked = data.worst;

  const axis = (title, more = {}) => ({
    title: { text: title, standoff: 8, font: { size: 12 } },
    gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line"), automargin: true, ...more,
  });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 30, b: 40 },
    font: { family: "system-ui, sans-serif", size: 12, color: style("--quiet") },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--text") }, align: "left" },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { color: style("--text") } },
    dragmode: false, ...more,
  });

  function drawLayers() {
    const layers = data.layers;
    const x = layers.map((_, index) => index + 1);
    const told = layers.map((row, index) =>
      `<b>${index + 1}. ${plain(middle(row.name, 48))}</b> ${plain(row.input ? "input" : row.op)}` +
      `<br>own ${decibel(row.own)}, as it runs ${decibel(row.runs)}` +
      (row.share === null ? "" : `<br>${percent(row.share)} of the error at the outputs`));
    // lines through so many points hide them
    const [mode, size] = layers.length > 80 ? ["markers", 5] : ["lines+markers", 6];
    const line = (name, key, color, symbol) => ({
      x, y: layers.map((row) => (row[key] === null ? null : Math.max(floor, row[key]))), name, type: "scatter",
      mode, line: { color: style(color), width: 1.5 }, marker: { size, symbol, color: style(color) }, hovertext: told, hoverinfo: "text",
    });
    const shares = {
      x, y: layers.map((row) => (row.share === null ? null : 100 * row.share)), name: "part of the error", type: "bar",
      yaxis: "y2", hovertext: told, hoverinfo: "text",
      marker: { color: layers.map((_, index) => style(index === picked ? "--second" : "--float")) }, showlegend: false,
    };
    const chosen = picked === null ? [] : [{
      type: "line", xref: "x", yref: "paper", x0: picked + 1, x1: picked + 1, y0: 0, y1: 1,
      line: { color: style("--quiet"), width: 1, dash: "dot" },
    }];
    const chart = at("layer-chart");
    Plotly.react(chart, [line("own error", "own", "--first", "circle"), line("as it runs", "runs", "--second", "diamond"), shares], layout({
      xaxis: axis("layer, in running order", { anchor: "y2", range: [0.3, layers.length + 0.7], zeroline: false, ...(layers.length <= 12 ? { dtick: 1 } : {}), fixedrange: true }),
      yaxis: axis("SQNR, dB", { domain: [0.36, 1], rangemode: "tozero", fixedrange: true }),
      yaxis2: axis("% of error", { domain: [0, 0.26], rangemode: "tozero", nticks: 4, fixedrange: true }),
      shapes: chosen, bargap: 0.25, hovermode: "closest", margin: { l: 52, r: 8, t: 30, b: 42 },
    }), config);
    if (!chart.dataset.heard) {
      chart.dataset.heard = "yes";
      chart.on("plotly_click", (event) => pick(event.points[0].x - 1));
    }
  }

  function drawBars(chart, caption, found, unit, words) {
    if (found === null) return;
    const middles = found.counts.map((_, index) => (found.edges[index] + found.edges[index + 1]) / 2);
    const widths = found.counts.map((_, index) => found.edges[index + 1] - found.edges[index]);
    const inside = middles.map((value) => value >= found.low && value <= found.high);
    const log = at("layer-log").checked;
    const bars = (name, color, kept) => ({
      x: middles.filter(kept), y: found.counts.filter(kept), width: widths.filter(kept), type: "bar", name,
      marker: { color: style(color), line: { width: 0 } }, hovertemplate: `%{x:.4g}: %{y}<extra></extra>`,
    });
    const edge = (value) => ({ type: "line", xref: "x", yref: "paper", x0: value, x1: value, y0: 0, y1: 1, line: { color: style("--text"), width: 1.2, dash: "dash" } });
    const strong = document.createElement("strong");
    strong.textContent = words;
    caption.replaceChildren(strong, ` ${found.bits} bits, range ${rounded(found.low)} to ${rounded(found.high)}; ` +
      `${percent(found.use, 0)} of the codes used, ${percent(found.clipped, 2)} beyond the range`);
    Plotly.react(chart, [bars("in the range", "--first", (_, i) => inside[i]), bars("beyond it", "--second", (_, i) => !inside[i])], layout({
      xaxis: axis(unit, { fixedrange: true, zeroline: false }),
      yaxis: axis("count", { type: log ? "log" : "linear", fixedrange: true, exponentformat: "power", ...(log ? { dtick: 1 } : { nticks: 5 }) }),
      shapes: [edge(found.low), edge(found.high)], barmode: "overlay", bargap: 0, margin: { l: 48, r: 8, t: 26, b: 40 },
    }), config);
    Plotly.Plots.resize(chart); // its neighbour may have come or gone
  }

  function drawPicked() {
    const row = data.layers[picked];
    at("layer-pick").value = String(picked);
    const facts = [`Own error ${decibel(row.own)}`, `as it runs ${decibel(row.runs)}`];
    if (row.cosine !== null) facts.push(`cosine ${row.cosine.toFixed(4)}`);
    if (row.share !== null) facts.push(`${percent(row.share)} of the error at the outputs`);
    const float = row.values === null ? " Its values stay in float." : "";
    const bare = row.weights === null ? " It has no weights with codes." : "";
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = row.name;
    at("layer-facts").replaceChildren(name, document.createElement("br"), `${facts.join(", ")}.${float}${bare}`);
    for (const kind of ["values", "weights"]) at(`${kind}-chart`).parentElement.hidden = row[kind] === null;
    drawBars(at("values-chart"), at("values-caption"), row.values, "value", "Its values:");
    drawBars(at("weights-chart"), at("weights-caption"), row.weights, "weight, in steps of its scale", "Its weights:");
    for (const button of document.querySelectorAll("button.layer")) {
      button.closest("tr").classList.toggle("picked", Number(button.dataset.layer) === picked);
    }
  }

  function pick(index) {
    picked = index;
    drawLayers();
    drawPicked();
  }

  function drawSweep() {
    const across = at("sweep-x").value;
    const metric = data.sweep.metrics.find((known) => known.name === at("sweep-y").value);
    const places = { size: (trial) => trial.size / 1e6, ms: (trial) => trial.ms };
    const height = (value) => (value === null || value === undefined ? null : metric.factor * value);
    const mark = (name, best) => {
      const kept = data.sweep.trials.filter((trial) => trial.best === best);
      const points = {
        x: kept.map(places[across]), y: kept.map((trial) => height(trial.scores[metric.name])), name, type: "scatter", mode: "markers+text",
        text: kept.map((trial) => plain(middle(trial.name, 24))), textposition: "top center", cliponaxis: false,
        textfont: { color: style(best ? "--text" : "--quiet"), size: 11 },
        marker: { size: 11, symbol: best ? "circle" : "circle-open", color: style(best ? "--first" : "--float"), line: { width: 2, color: style(best ? "--first" : "--float") } },
        hovertemplate: "%{text}<br>%{x:.3f}, %{y:.2f}<extra></extra>",
      };
      if (kept.some((trial) => metric.name in trial.intervals)) {
        const beyond = (trial, end) => (metric.name in trial.intervals ? Math.abs(height(trial.intervals[metric.name][end] - trial.scores[metric.name])) : 0);
        points.error_y = {
          type: "data", symmetric: false, color: style("--float"), thickness: 1, width: 3,
          array: kept.map((trial) => beyond(trial, 1)), arrayminus: kept.map((trial) => beyond(trial, 0)),
        };
      }
      return points;
    };
    Plotly.react(at("sweep-chart"), [mark("unbeaten", true), mark("beaten", false)], layout({
      xaxis: axis(across === "size" ? "size, MB" : "time of a run, ms", { fixedrange: true, zeroline: false }),
      yaxis: axis(metric.heading, { fixedrange: true, zeroline: false }), hovermode: "closest",
    }), config);
  }

  function drawPrecision() {
    const { float, points } = data.precision;
    const words = (point) =>
      `${rounded(point.time)} of the time, ${decibel(point.db)} ${point.measured ? "measured" : "predicted"}<br>` +
      `${point.nodes} node${point.nodes === 1 ? "" : "s"} in float`;
    const marks = (name, kept, color, symbol, size) => {
      const some = points.filter((point) => point.db !== null && kept(point));
      return {
        x: some.map((point) => point.time), y: some.map((point) => point.db), name, type: "scatter", mode: "markers", cliponaxis: false,
        marker: { size, symbol, color: style(color), line: { width: 2, color: style(color) } }, hovertext: some.map(words), hoverinfo: "text",
      };
    };
    const sorted = points.filter((point) => point.db !== null).sort((a, b) => a.time - b.time);
    const line = {
      x: sorted.map((point) => point.time), y: sorted.map((point) => point.db), type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
      line: { color: style("--line"), width: 1.5 },
    };
    const ends = [...points.map((point) => point.time), float];
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    const room = 0.05 * (high - low) || 0.05;
    Plotly.react(at("precision-chart"), [
      line,
      marks("predicted", (point) => !point.measured && !point.chosen, "--float", "circle-open", 9),
      marks("measured", (point) => point.measured && !point.chosen, "--first", "circle", 9),
      marks("taken", (point) => point.chosen, "--second", "diamond", 13),
    ], layout({
      xaxis: axis("time of a run, over that of all in integers", { fixedrange: true, zeroline: false, range: [low - room, high + room] }),
      yaxis: axis("SQNR, dB", { fixedrange: true, zeroline: false }), hovermode: "closest",
      shapes: [{ type: "line", xref: "x", yref: "paper", x0: float, x1: float, y0: 0, y1: 1, line: { color: style("--float"), width: 1.2, dash: "dash" } }],
      annotations: [{ x: float, y: 0.04, yref: "paper", text: "all in float", showarrow: false, xanchor: float > (low + high) / 2 ? "right" : "left" }],
    }), config);
  }

  function drawSynthesis() {
    const { loss, layers } = data.synthesis;
    const line = (name, x, y, color, told) => ({
      x, y, name, type: "scatter", mode: x.length > 80 ? "lines" : "lines+markers", marker: { size: 5, color: style(color) },
      line: { color: style(color), width: 1.5 }, hovertext: told, hoverinfo: told ? "text" : "x+y",
    });
    const logarithmic = (title) => axis(title, { type: "log", fixedrange: true, zeroline: false });
    const across = (title) => axis(title, { fixedrange: true, zeroline: false });
    Plotly.react(at("loss-chart"), [line("distance", loss.map((_, i) => i + 1), loss, "--first")], layout({
      xaxis: across("step"), yaxis: logarithmic("distance"), showlegend: false, hovermode: "closest",
    }), config);
    const places = layers.map((_, i) => i + 1);
    const of = (name, key, color) => line(name, places, layers.map((row) => row[key]), color,
      layers.map((row) => `${plain(middle(row.name, 48))}<br>${name} ${rounded(row[key])}`));
    Plotly.react(at("distance-chart"), [of("at first", "before", "--float"), of("now", "after", "--first")], layout({
      xaxis: across("BatchNormalization"), yaxis: logarithmic("distance"), hovermode: "closest",
    }), config);
  }

  function drawStudy() {
    const { pictures, enough, metrics, draws, spread } = data.study;
    const counts = spread.map((row) => row.pictures);
    const [first, last] = [Math.log10(counts[0]), Math.log10(pictures)];
    const edge = (x0, x1, y0, y1, xref, yref) => ({
      type: "line", xref, yref, x0, x1, y0, y1, line: { color: style("--float"), width: 1.2, dash: "dash" },
    });
    for (const [index, { name: key, heading, sign, factor }] of metrics.entries()) {
      const color = index % 2 ? "--second" : "--first";
      const rows = spread.filter((row) => row[key] !== null);
      const dots = draws.filter((draw) => draw[key] !== null);
      const of = (which) => rows.map((row) => factor * row[key][which]);
      const line = (name, which, more) => ({
        x: rows.map((row) => Math.log10(row.pictures)), y: of(which), name, type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
        line: { color: style(color), width: 0 }, ...more,
      });
      const level = rows.find((row) => row.pictures === pictures);
      const shapes = level === undefined ? [] : [edge(0, 1, factor * level[key][1], factor * level[key][1], "paper", "y")];
      if (enough !== null) shapes.push(edge(Math.log10(enough), Math.log10(enough), 0, 1, "x", "paper"));
      Plotly.react(at(`study-${key}-chart`), [
        line("worst", 0, {}), line("worst to best", 2, { fill: "tonexty" }),
        line("median", 1, { line: { color: style(color), width: 2.5 } }),
        {
          x: dots.map((draw) => Math.log10(draw.pictures)), y: dots.map((draw) => factor * draw[key]), name: "a draw", type: "scatter", mode: "markers",
          marker: { size: 7, color: style(color), line: { width: 1, color: style("--card") } }, hoverinfo: "text", showlegend: false,
          hovertext: dots.map((draw) => `${draw.pictures} of ${pictures} pictures, draw ${draw.seed}: ${rounded(factor * draw[key])} ${sign}`),
        },
      ], layout({
        // places are logarithms, so that ticks, lines and dots agree on them
        xaxis: axis("calibration pictures", {
          fixedrange: true, zeroline: false, tickvals: counts.map(Math.log10), ticktext: counts.map(String),
          range: first < last ? [first - 0.05 * (last - first), last + 0.05 * (last - first)] : [first - 1, first + 1],
        }),
        yaxis: axis(heading, { fixedrange: true, zeroline: false }), shapes, hovermode: "closest",
      }), config);
    }
  }

  function draw() {
    if (picked !== null) pick(picked);
    if (data.precision) drawPrecision();
    if (data.sweep) drawSweep();
    if (data.synthesis) drawSynthesis();
    if (data.study) drawStudy();
  }

  function listen() {
    if (data.worst !== null) {
      at("layer-pick").addEventListener("change", (event) => pick(Number(event.target.value)));
      at("layer-log").addEventListener("change", drawPicked);
    }
    for (const id of data.sweep ? ["sweep-x", "sweep-y"] : []) at(id).addEventListener("change", drawSweep);
    for (const button of document.querySelectorAll("button.layer")) {
      button.addEventListener("click", () => {
        pick(Number(button.dataset.layer));
        at("layer-chart").scrollIntoView({ behavior: "smooth" });
      });
    }
    for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => copy(button));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  async function copy(button) {
    const source = at(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch { // a browser may refuse it to a file: then it is marked, to be copied by hand
      getSelection().selectAllChildren(source);
    }
  }

  listen();
  draw();
})();
