"use strict";
// Values under the pointer, or at the cursor that the arrow keys move. The charts themselves need no script.
(() => {
  const number = (v) => {
    const a = Math.abs(v);
    if (a >= 1e4) return v.toLocaleString("en", { maximumFractionDigits: 0 });
    return a !== 0 && a < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };
  let ready = 0;
  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const plot = figure.querySelector(".plot"), area = figure.querySelector(".area");
    const cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
    const [left, right] = data.x, first = data.lines[0];
    let at = first.x.length - 1;
    const hide = () => { cursor.hidden = tip.hidden = true; };
    const show = (x) => {
      at = nearest(first.x, x);
      const step = first.x[at];
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = "step " + step.toLocaleString("en");
      tip.append(head);
      for (const line of data.lines) {
        const i = nearest(line.x, step);
        // A line of few points, such as the validation, says of which of its steps the value is.
        const far = Math.abs(line.x[i] - step) > (right - left) / 100;
        const row = document.createElement("div"), mark = document.createElement("i"), value = document.createElement("span");
        row.className = "key " + line.style;
        value.textContent = number(line.y[i]) + (data.unit.length < 3 && data.unit ? " " + data.unit : "") + (far ? " (step " + line.x[i].toLocaleString("en") + ")" : "");
        row.append(mark, line.name, value);
        tip.append(row);
      }
      cursor.hidden = tip.hidden = false;
      const place = (step - left) / (right - left);
      cursor.style.left = 100 * place + "%";
      const room = area.clientWidth - tip.offsetWidth - 12, wanted = place * area.clientWidth + 12;
      tip.style.left = Math.max(0, wanted <= room ? wanted : wanted - tip.offsetWidth - 24) + "px";
    };
    plot.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      show(left + (right - left) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) {
        event.preventDefault();
        show(first.x[Math.min(first.x.length - 1, Math.max(0, at + by * Math.max(1, first.x.length >> 7)))]);
      }
    });
    ready += 1;
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  document.documentElement.dataset.charts = ready;
})();
