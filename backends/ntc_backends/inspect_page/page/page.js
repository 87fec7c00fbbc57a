"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const populations = data.populations;
  const L = data.tokens.length;
  const LEFT = 46, TOP = 10, RIGHT = 8;
  const FONT = "11px system-ui, 'Liberation Sans', sans-serif";
  let chosen = 0;

  // ---- blocks
  for (const button of document.querySelectorAll("[data-open]")) {
    button.addEventListener("click", () => {
      for (const d of document.querySelectorAll(".section > details")) d.open = button.dataset.open === "all";
    });
  }

  // ---- sortable tables
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const numeric = Boolean(head.dataset.kind);
        const first = numeric && head.dataset.kind === "number" ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const way = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", way);
        const value = (row) => {
          const cell = row.cells[column];
          return numeric ? Number(cell.dataset.value) : cell.textContent;
        };
        const sign = way === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const x = value(a), y = value(b);
          return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
  if (!populations.length) return;

  // ---- decoding
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => {
    const view = new DataView(bytes(text).buffer);
    return Float32Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
  };
  const bit = (packed, i) => (packed[i >> 3] >> (7 - (i & 7))) & 1;
  const spikesOf = (p) => {
    if (!p.unpacked) p.unpacked = { plus: bytes(p.plus), minus: p.minus ? bytes(p.minus) : null };
    return p.unpacked;
  };
  const neuronOf = (p, row) => Math.floor((row * p.size) / p.rows);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (x) => (100 * x).toFixed(1) + " %";
  const whole = (x) => x.toLocaleString("en-US");
  const plural = (n, word) => whole(n) + " " + word + (n === 1 ? "" : "s");

  // A canvas of that height, in CSS pixels whatever the resolution of the screen.
  function prepared(canvas, height) {
    const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = FONT;
    return { context, width, height };
  }

  // Texts of tokens below the axis, as many as there is room for; their longest is how much room they take.
  const texts = data.tokens.map((token) => {
    const letters = [...token];
    return letters.length > 11 ? letters.slice(0, 10).join("") + "…" : token;
  });
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = FONT;
  const BOTTOM = 16 + Math.ceil(Math.max(...texts.map((text) => ruler.measureText(text).width)));
  function tokenAxis(context, from, count, tokenWidth, y) {
    const every = Math.max(1, Math.ceil(12 / tokenWidth));
    context.fillStyle = colour("--muted");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let i = 0; i < count; i += every) {
      context.save();
      context.translate(LEFT + (i + 0.5) * tokenWidth, y + 6);
      context.rotate(-Math.PI / 2);
      context.fillText(texts[from + i], 0, 0);
      context.restore();
    }
  }

  // ---- spike raster
  function raster() {
    const p = populations[chosen], columns = L * p.steps, { plus, minus } = spikesOf(p);
    // A whole number of pixels per neuron, or of neurons per pixel, so that all rows look alike.
    const most = 520, plot = p.rows > most ? Math.ceil(p.rows / Math.ceil(p.rows / most)) : p.rows * Math.min(16, Math.floor(most / p.rows));
    const { context: c, width, height } = prepared($("raster"), TOP + plot + BOTTOM);
    const span = width - LEFT - RIGHT;
    c.clearRect(0, 0, width, height);
    // One pixel per neuron and step; the canvas scales it: crisp when it grows, the mean of neighbours when it shrinks.
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = p.rows;
    const paint = small.getContext("2d"), image = paint.createImageData(columns, p.rows);
    const rgb = (name) => {
      paint.fillStyle = colour(name); // reads back as #rrggbb
      return [1, 3, 5].map((i) => parseInt(paint.fillStyle.slice(i, i + 2), 16)).concat(255);
    };
    const up = rgb("--plus"), down = rgb("--minus");
    for (let i = 0; i < columns * p.rows; i++) {
      if (bit(plus, i)) image.data.set(up, 4 * i);
      else if (minus && bit(minus, i)) image.data.set(down, 4 * i);
    }
    paint.putImageData(image, 0, 0);
    const each = span / L;
    c.fillStyle = colour("--soft");
    for (let i = 1; i < L; i += 2) c.fillRect(LEFT + i * each, TOP, each, plot);
    const step = span / columns, gap = step > 4 ? 1.5 : step > 2.5 ? 0.75 : 0;
    c.imageSmoothingEnabled = plot < p.rows || step < 1;
    c.imageSmoothingQuality = "high";
    if (gap) for (let i = 0; i < columns; i++) c.drawImage(small, i, 0, 1, p.rows, LEFT + i * step + gap / 2, TOP, step - gap, plot);
    else c.drawImage(small, LEFT, TOP, span, plot);
    c.strokeStyle = colour("--line");
    c.strokeRect(LEFT - 0.5, TOP - 0.5, span + 1, plot + 1);
    c.fillStyle = colour("--muted");
    c.textAlign = "right";
    c.textBaseline = "middle";
    const ticks = Math.min(4, p.rows - 1) || 1;
    for (let i = 0; i <= ticks; i++) {
      const row = Math.round((i * (p.rows - 1)) / ticks);
      c.fillText(whole(neuronOf(p, row)), LEFT - 6, TOP + ((row + 0.5) * plot) / p.rows);
    }
    tokenAxis(c, 0, L, each, TOP + plot);
    const sampled = p.rows < p.size ? "; " + whole(p.rows) + " of them shown, evenly spaced" : "";
    const text = p.name + ": " + plural(p.size, "neuron") + sampled + ", " + plural(L, "token") + " of " + plural(p.steps, "step") + ", firing rate " + percent(p.rate);
    $("raster").setAttribute("aria-label", "Spike raster of " + text);
    $("raster-text").textContent = text + ".";
    $("raster").plot = { p, span, plot, text };
  }
  $("raster").addEventListener("pointermove", (event) => {
    const { p, span, plot, text } = $("raster").plot;
    const column = Math.floor(((event.offsetX - LEFT) / span) * L * p.steps);
    const row = Math.floor(((event.offsetY - TOP) / plot) * p.rows);
    const inside = column >= 0 && column < L * p.steps && row >= 0 && row < p.rows;
    if (!inside) {
      $("raster-text").textContent = text + ".";
      return;
    }
    const token = Math.floor(column / p.steps), { plus, minus } = spikesOf(p), i = row * L * p.steps + column;
    const state = bit(plus, i) ? "fires" : minus && bit(minus, i) ? "fires −1" : "is silent";
    $("raster-text").textContent = "Token " + (token + 1) + " “" + data.tokens[token] + "”, step " + ((column % p.steps) + 1) + ": neuron " + whole(neuronOf(p, row)) + " " + state + ".";
  });
  $("raster").addEventListener("pointerleave", () => { $("raster-text").textContent = $("raster").plot.text + "."; });
  $("raster").addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") choose((chosen + 1) % populations.length);
    else if (event.key === "ArrowLeft") choose((chosen + populations.length - 1) % populations.length);
    else return;
    event.preventDefault();
  });

  // ---- histogram of firing rates
  function histogram() {
    const p = populations[chosen], width = Math.max(260, $("histogram").clientWidth), base = 112, names = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(names, "svg");
    svg.setAttribute("viewBox", "0 0 " + width + " 146");
    svg.setAttribute("role", "img");
    svg.setAttribute("width", width);
    const add = (tag, attributes, text) => {
      const e = document.createElementNS(names, tag);
      for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
      if (text !== undefined) e.textContent = text;
      svg.append(e);
    };
    const most = Math.max(...p.histogram), each = (width - 20) / data.bins;
    const high = (n) => (n ? Math.max(1.5, (88 * n) / most) : 0);
    p.histogram.forEach((n, i) => {
      const x = 10 + i * each;
      const silent = i === 0 ? p.dead : 0; // at the bottom of the first bar, those that never fired
      add("rect", { x: x + 1, y: base - high(n), width: each - 2, height: high(n) });
      if (silent) add("rect", { class: "dead", x: x + 1, y: base - (high(n) * silent) / n, width: each - 2, height: (high(n) * silent) / n });
      if (n && width > 420 && (n === most || n > most / 8)) add("text", { x: x + each / 2, y: base - high(n) - 5, "text-anchor": "middle" }, whole(n));
    });
    add("path", { d: "M10 " + (base + 0.5) + "H" + (width - 10) });
    for (let i = 0; i <= 4; i++) add("text", { x: 10 + ((width - 20) * i) / 4, y: base + 16, "text-anchor": i === 0 ? "start" : i === 4 ? "end" : "middle" }, 25 * i + " %");
    add("text", { x: width / 2, y: base + 32, "text-anchor": "middle" }, "firing rate of a neuron on this prompt");
    const text = whole(p.dead) + " of " + plural(p.size, "neuron") + " never fired (grey), " + whole(p.saturated) + " fired at every step.";
    svg.setAttribute("aria-label", "Histogram of firing rates of " + p.name + ". " + text);
    $("histogram").replaceChildren(svg);
    $("histogram-text").textContent = text;
  }

  // ---- membranes
  function traces() {
    const canvas = $("traces");
    if (!canvas) return;
    const p = populations[chosen], n = p.traces.length, high = 96, slider = $("first-token");
    if (!n) {
      prepared(canvas, 40);
      $("traces-text").textContent = "The dynamics of these neurons are not known to ntc inspect, so their membranes cannot be shown.";
      return;
    }
    const width0 = canvas.clientWidth - LEFT - RIGHT;
    const count = Math.max(1, Math.min(L, Math.floor(width0 / (Math.max(9, 40 / p.steps) * p.steps))));
    slider.max = L - count;
    slider.parentElement.hidden = count === L;
    const from = Math.min(Number(slider.value), L - count);
    $("first-text").textContent = from + 1 + " to " + (from + count) + " of " + L;
    const { context: c, width } = prepared(canvas, TOP + n * high + BOTTOM - 8);
    const each = (width - LEFT - RIGHT) / count, step = each / (p.steps + 1);
    c.clearRect(0, 0, width, canvas.clientHeight);
    p.traces.forEach((trace, k) => {
      trace.u = trace.u || floats(trace.before);
      trace.v = trace.v || floats(trace.after);
      const top = TOP + k * high + 16, plot = high - 24, i0 = from * p.steps, i1 = (from + count) * p.steps;
      let low = Math.min(0, trace.start), top1 = trace.threshold;
      for (let i = i0; i < i1; i++) {
        low = Math.min(low, trace.u[i], trace.v[i]);
        top1 = Math.max(top1, trace.u[i], trace.v[i]);
      }
      // A neuron far from its threshold must not flatten what happens near it: the axis ends four thresholds away, and what is beyond is cut.
      low = Math.max(low, -3 * trace.threshold);
      top1 = Math.min(top1, 4 * trace.threshold);
      const y = (value) => top + plot * (1 - (Math.min(top1, Math.max(low, value)) - low) / (top1 - low || 1));
      for (let i = 0; i < count; i++) {
        c.fillStyle = colour(i % 2 ? "--soft" : "--surface");
        c.fillRect(LEFT + i * each, top - 4, each, plot + 8);
      }
      c.lineWidth = 1;
      c.strokeStyle = colour("--line");
      line(c, LEFT, y(0), width - RIGHT, y(0));
      c.strokeStyle = colour("--muted");
      c.setLineDash([5, 4]);
      line(c, LEFT, y(trace.threshold), width - RIGHT, y(trace.threshold));
      c.setLineDash([]);
      c.fillStyle = colour("--muted");
      c.textBaseline = "middle";
      c.textAlign = "right";
      c.fillText("θ", LEFT - 6, y(trace.threshold));
      if (Math.abs(y(0) - y(trace.threshold)) > 12) c.fillText("0", LEFT - 6, y(0));
      c.textAlign = "left";
      c.fillText("neuron " + whole(trace.neuron) + " · " + plural(trace.spikes, "spike") + " · θ = " + Number(trace.threshold.toPrecision(4)), LEFT, top - 11);
      c.lineWidth = 1.6;
      c.lineJoin = "round";
      c.strokeStyle = colour("--chip");
      const dots = [];
      for (let token = 0; token < count; token++) {
        let x = LEFT + token * each + step / 2;
        c.beginPath();
        c.moveTo(x, y(trace.start));
        for (let t = 0; t < p.steps; t++) {
          const i = (from + token) * p.steps + t;
          x += step;
          c.lineTo(x, y(trace.u[i]));
          if (trace.u[i] !== trace.v[i]) {
            dots.push([x, y(trace.u[i]), trace.u[i] < trace.v[i]]);
            c.lineTo(x, y(trace.v[i]));
          }
        }
        c.stroke();
      }
      for (const [x, dot, negative] of dots) {
        c.fillStyle = colour(negative ? "--minus" : "--plus");
        c.beginPath();
        c.arc(x, dot, Math.min(3.2, step / 2.4), 0, 2 * Math.PI);
        c.fill();
      }
    });
    tokenAxis(c, from, count, each, TOP + n * high - 4);
    const text = "Membrane potentials of " + plural(n, "neuron") + " of " + p.name + ", tokens " + (from + 1) + " to " + (from + count) + "; " + p.reset + " reset. Axes end four thresholds above 0.";
    canvas.setAttribute("aria-label", text);
    $("traces-text").textContent = text;
  }
  function line(c, x0, y0, x1, y1) {
    c.beginPath();
    c.moveTo(x0, y0);
    c.lineTo(x1, y1);
    c.stroke();
  }

  // ---- choosing a population
  const select = $("population");
  const groups = new Map();
  populations.forEach((p, i) => {
    if (!groups.has(p.block)) {
      const group = document.createElement("optgroup");
      group.label = p.block || "outside of blocks";
      groups.set(p.block, group);
      select.append(group);
    }
    const option = document.createElement("option");
    option.value = i;
    option.textContent = (p.role ? p.role + " · " : "") + p.name + " · " + percent(p.rate);
    groups.get(p.block).append(option);
  });
  function choose(i) {
    chosen = i;
    select.value = String(i);
    draw();
  }
  function draw() {
    if ($("raster").clientWidth < 120) return; // not laid out yet; the observer below calls again
    raster();
    histogram();
    traces();
  }
  select.addEventListener("change", () => choose(Number(select.value)));
  $("previous").addEventListener("click", () => choose((chosen + populations.length - 1) % populations.length));
  $("next").addEventListener("click", () => choose((chosen + 1) % populations.length));
  if ($("first-token")) $("first-token").addEventListener("input", traces);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-population]");
    if (!link) return;
    const i = populations.findIndex((p) => p.name === link.dataset.population);
    if (i >= 0) choose(i);
  });

  // ---- size, colours, paper
  let waiting = 0;
  const later = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  };
  let width = 0;
  new ResizeObserver(() => {
    if ($("raster").clientWidth === width) return;
    width = $("raster").clientWidth;
    later();
  }).observe($("raster"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  window.addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); draw(); });
  window.addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); draw(); });
  choose(0);
})();
