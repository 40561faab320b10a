// Shows openapi.json: every route with its fields. Texts of the document become text, never HTML.

const spec = await (await fetch("openapi.json")).json();

function make(parent, name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

/** A part of the document with what it refers to in its place. */
function whole(part) {
  if (!part.$ref) return part;
  const path = part.$ref.split("/").slice(1);
  return { title: path.at(-1), ...path.reduce((at, name) => at[name], spec), ...part, $ref: undefined };
}

/** The fields of an object, those that must be there first: [name, schema, whether it must be there]. */
function fields(schema) {
  const { allOf = [], properties = {}, required = [] } = whole(schema);
  const own = Object.entries(properties).map(([name, of]) => [name, whole(of), required.includes(name)]);
  return [...own, ...allOf.flatMap(fields)].sort((a, b) => b[2] - a[2]);
}

/** A type in words. That it may be null goes without saying. */
function type(schema) {
  const of = whole(schema);
  const choices = of.oneOf ?? of.anyOf;
  if (choices && !of.properties) return [...new Set(choices.map(type).filter(Boolean))].join(" or ");
  if (of.enum) return of.enum.filter((value) => value !== null).map((value) => JSON.stringify(value)).join(", ");
  const names = [of.type ?? "anything"].flat().filter((name) => name !== "null").map((name) => {
    if (name === "array") return `list of ${type(of.items ?? {})}`;
    return name === "object" && of.title ? of.title : name;
  });
  return names.join(" or ");
}

/** Objects within a schema that have fields: [what tells them apart, schema]. */
function inner(schema) {
  const of = whole(schema);
  const choices = of.oneOf ?? of.anyOf;
  if (choices && !of.properties) return choices.flatMap(inner);
  if (of.items) return inner(of.items);
  const kinds = (of.properties?.type ?? of.properties?.role)?.enum?.join(", ");
  return fields(of).length ? [[kinds ?? of.title ?? "object", of]] : [];
}

function limits({ minimum, maximum, minLength, minItems, maxItems, pattern, default: usual }) {
  const all = { from: minimum, to: maximum, "characters from": minLength, "items from": minItems, "items to": maxItems, pattern };
  const said = Object.entries(all).filter(([, value]) => value !== undefined).map(([name, value]) => `${name} ${value}`);
  if (usual !== undefined) said.push(`default ${JSON.stringify(usual)}`);
  return said.join(", ");
}

function table(parent, caption, rows) {
  const made = make(parent, "table");
  make(made, "caption", caption).className = "skip";
  const head = make(make(made, "thead"), "tr");
  for (const name of ["Field", "Type", "Meaning"]) make(head, "th", name).scope = "col";
  const body = make(made, "tbody");
  for (const [name, schema, required] of rows) {
    if (!type(schema)) continue; // Only null.
    const row = make(body, "tr");
    const field = make(row, "th");
    field.scope = "row";
    make(field, "code", name);
    if (required) field.append(" (required)");
    make(row, "td", type(schema));
    const about = make(row, "td");
    if (schema.description) make(about, "div", schema.description);
    if (limits(schema)) make(about, "div", limits(schema));
    if (!inner(schema).length) continue;
    const more = make(make(body, "tr"), "td");
    more.colSpan = 3;
    more.className = "more";
    for (const [of, part] of inner(schema)) details(more, `Fields of ${name}: ${of}`, part);
  }
}

/** Made when it is opened: schemas may be within themselves. */
function details(parent, title, schema) {
  const made = make(parent, "details");
  make(made, "summary", title);
  made.addEventListener("toggle", () => {
    if (made.children.length > 1) return;
    if (schema.description) make(made, "p", schema.description);
    table(made, title, fields(schema));
  });
}

function command(method, path, example) {
  const body = example === undefined ? "" : ` \\\n  -H 'Content-Type: application/json' -d '${JSON.stringify(example).replaceAll("'", "'\\''")}'`;
  return `curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${location.origin}${path}${body}`;
}

function route(path, method, about) {
  const title = `${method.toUpperCase()} ${path}`;
  const section = make(document.getElementById("routes"), "section");
  section.id = title.replace(/[^a-zA-Z]+/g, "-");
  const link = make(make(document.getElementById("list"), "li"), "a", title);
  link.href = `#${section.id}`;
  make(make(section, "h2"), "code", title);
  section.setAttribute("aria-label", title);
  make(section, "p", about.summary);
  if (about.description) make(section, "p", about.description);
  if (about.parameters) {
    make(section, "h3", "Parts of the path");
    table(section, `Parts of ${path}`, about.parameters.map((p) => [p.name, { description: p.description, ...p.schema }, p.required]));
  }
  const body = about.requestBody?.content["application/json"];
  if (body) {
    make(section, "h3", "Fields");
    table(section, `Fields of ${title}`, fields(body.schema));
  }
  make(section, "h3", "Example");
  make(section, "pre", command(method, path, body?.example)).tabIndex = 0;
  make(section, "h3", "Answers");
  for (const [status, answer] of Object.entries(about.responses)) {
    const { description, content = {} } = whole(answer);
    const line = make(section, "div");
    make(line, "code", status);
    line.append(` ${description} (${Object.keys(content).join(" or ")})`);
    // All errors of a route look alike.
    if (Number(status) > 400) continue;
    for (const { schema } of Object.values(content)) {
      for (const [of, part] of inner(schema)) details(line, `Fields of ${of}`, part);
    }
  }
}

const header = document.getElementById("about");
header.textContent = `${spec.info.title} ${spec.info.version}. ${spec.info.description}`;
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, about] of Object.entries(methods)) route(path, method, about);
}
if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
