// Markdown as models write it, made into elements: never into HTML text, so that an answer cannot bring a script.

function inline(parent, text) {
  const token = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*([^\s*][^*]*)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;
  let at = 0;
  for (const m of text.matchAll(token)) {
    parent.append(text.slice(at, m.index));
    at = m.index + m[0].length;
    if (m[2] !== undefined) element(parent, "code").textContent = m[2];
    else if (m[3] !== undefined) inline(element(parent, "strong"), m[3]);
    else if (m[4] !== undefined) inline(element(parent, "em"), m[4]);
    else {
      const link = element(parent, "a");
      link.href = m[6];
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      link.textContent = m[5];
    }
  }
  parent.append(text.slice(at));
}

function element(parent, name) {
  const made = document.createElement(name);
  parent.append(made);
  return made;
}

/** Shows `text` in `parent` in the place of what is there. */
export function show(parent, text) {
  const all = document.createDocumentFragment();
  let list = null, paragraph = null;
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(/^\s*(```+|~~~+)/);
    const item = line.match(/^\s*(?:([-*+])|\d+[.)])\s+(.*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)/);
    if (!item) list = null;
    if (fence || item || heading || !line.trim()) paragraph = null;
    if (fence) {
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      const block = element(all, "pre");
      block.tabIndex = 0; // Long lines are scrolled by keyboard too.
      element(block, "code").textContent = code.join("\n");
    } else if (heading) {
      // Below the page's own headings.
      inline(element(all, `h${Math.min(heading[1].length + 2, 6)}`), heading[2]);
    } else if (item) {
      const kind = item[1] ? "UL" : "OL";
      if (list?.tagName !== kind) list = element(all, kind.toLowerCase());
      inline(element(list, "li"), item[2]);
    } else if (line.startsWith(">")) {
      inline(element(all, "blockquote"), line.slice(1).trim());
    } else if (line.trim()) {
      if (paragraph) element(paragraph, "br");
      else paragraph = element(all, "p");
      inline(paragraph, line);
    }
  }
  parent.replaceChildren(all);
}
