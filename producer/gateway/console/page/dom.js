// Elements from data, and a tree brought up to date in place: focus, selection and scrolling stay where they are, and
// nothing flickers. Text only ever becomes a text node: whatever a prompt or a name holds is shown, never parsed.

/**
 * An element. `attributes`: by name; null, undefined and false leave one out. Children: nodes, texts, arrays of them.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

/** As `h`, of SVG. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(element, child);
    else element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Make the children of `parent` look like `children`. An element with `data-keep` is left alone once it is there. */
export function fill(parent, ...children) {
  const wanted = document.createElement(parent.tagName);
  append(wanted, children);
  morphChildren(parent, wanted);
}

function morphChildren(current, wanted) {
  const keyed = new Map();
  for (const child of current.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
  let at = current.firstChild;
  for (const next of [...wanted.childNodes]) {
    const key = next.dataset?.key;
    const match = key ? keyed.get(key) : isAlike(at, next) ? at : null;
    if (!match) {
      current.insertBefore(next, at);
      continue;
    }
    if (match !== at) current.insertBefore(match, at);
    else at = at.nextSibling;
    morph(match, next);
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function isAlike(current, next) {
  return current && current.nodeName === next.nodeName && !current.dataset?.key;
}

function morph(current, next) {
  if (current.nodeType === Node.TEXT_NODE) {
    if (current.data !== next.data) current.data = next.data;
    return;
  }
  if (current.dataset?.keep) return;
  for (const { name } of [...current.attributes]) {
    // What a reader has opened stays open.
    if (!next.hasAttribute(name) && !(name === "open" && current.tagName === "DETAILS")) current.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (current.getAttribute(name) !== value) current.setAttribute(name, value);
  }
  morphChildren(current, next);
}
