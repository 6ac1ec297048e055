// On the textbook's page: gamma as a slider, the average's window and the path beside it.
document.addEventListener("DOMContentLoaded", () => {
  const section = document.querySelector("section#on-a-quadratic");
  if (!section) return;
  const RATE = 0.4, EPS = 1e-6, STEPS = 20;

  // The path of 0.1 x1^2 + 2 x2^2 from (-5, -2), by the equations of the page.
  const path = gamma => {
    let x = [-5, -2], nu = [0, 0];
    const points = [x];
    for (let t = 0; t < STEPS; t++) {
      const g = [0.2 * x[0], 4 * x[1]];
      nu = nu.map((s, i) => gamma * s + (1 - gamma) * g[i] ** 2);
      x = x.map((v, i) => v - RATE * g[i] / Math.sqrt(nu[i] + EPS));
      points.push(x);
    }
    return points;
  };
  const node = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const picture = title => {
    const svg = node("svg", { viewBox: "0 0 300 200", role: "img", "aria-label": title });
    section.querySelector(".gamma-pictures").append(svg);
    return svg;
  };

  section.insertAdjacentHTML("beforeend", `
    <div class="gamma-slider">
      <p><label>gamma <input type="range" min="0" max="3" step="0.01" value="1"></label>
      <output></output></p>
      <div class="gamma-pictures"></div>
    </div>`);
  const input = section.querySelector(".gamma-slider input");
  const said = section.querySelector(".gamma-slider output");
  const window_ = picture("The weight of each of the last 40 gradients");
  const plane = picture("Twenty steps across the valley");
  const across = x => 20 + 260 * (x + 6) / 8, down = y => 100 - 80 * y / 3;

  const draw = () => {
    const gamma = 1 - 10 ** -input.value, points = path(gamma), [x1, x2] = points[STEPS];
    said.textContent = `${gamma.toPrecision(3)}: looks back ${(1 / (1 - gamma)).toFixed(0)}`
      + ` steps; after 20 steps x1 ${x1.toFixed(6)}, x2 ${x2.toFixed(6)}`;
    window_.replaceChildren(...Array.from({ length: 40 }, (_, t) => {
      const height = 180 * gamma ** t;
      return node("rect", { x: 10 + 7 * t, y: 190 - height, width: 5, height });
    }));
    const ellipses = [0.5, 2, 8].map(level => node("ellipse", {
      cx: across(0), cy: down(0), class: "contour",
      rx: 32.5 * Math.sqrt(level / 0.1), ry: 80 / 3 * Math.sqrt(level / 2),
    }));
    plane.replaceChildren(...ellipses, node("polyline", {
      points: points.map(([a, b]) => `${across(a)},${down(b)}`).join(" "),
    }), ...points.map(([a, b]) => node("circle", { cx: across(a), cy: down(b), r: 3 })));
  };
  input.addEventListener("input", draw);
  draw();
});
