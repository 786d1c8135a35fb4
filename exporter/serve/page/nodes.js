// Nodes of the page. A text becomes a text node and nothing else.

// Characters that reorder or hide what stands beside them: a reader must see that they are there.
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/;

/** An element with properties, attributes (what begins with a small letter and is no property) and children; strings become text. */
export function h(name, given = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && !key.startsWith("aria") && key !== "list") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Text as nodes: steering characters are named. */
export function plain(text) {
  if (!STEERING.test(text)) return [text];
  return text.split(new RegExp(`(${STEERING.source})`)).filter(Boolean).map((part) => {
    if (!STEERING.test(part)) return part;
    const name = `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return h("span", { className: "steering", title: `The control character ${name} stands here` }, name);
  });
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no secure context, such as a plain address in a home network
    const area = h("textarea", { value: text, className: "offscreen" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser does not let the page copy");
  }
}

export function copyButton(label, text) {
  const button = h("button", { type: "button", className: "quiet", "aria-label": label, title: label }, icon("copy"), h("span", {}, "Copy"));
  button.addEventListener("click", async () => {
    const word = button.querySelector("span");
    try {
      await copy(text());
      word.textContent = "Copied";
    } catch (error) {
      word.textContent = "Not copied";
      button.title = error.message;
    }
    setTimeout(() => { word.textContent = "Copy"; }, 1500);
  });
  return button;
}
