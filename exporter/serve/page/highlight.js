// Code in colours: comments, strings, numbers and words of the language, by one pattern of each kind of language. What is long, or in a
// language that is not listed, stays plain.

import { h, plain } from "./nodes.js";

const LONGEST = 20_000;  // characters; a block is coloured again as it grows
const COMMENT = { hash: "#[^\\n]*", slash: "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", dash: "--[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", star: "\\/\\*[^]*?(?:\\*\\/|$)", tag: "<!--[^]*?(?:-->|$)" };
const DOUBLE = '"(?:[^"\\\\\\n]|\\\\[^])*"?', SINGLE = "'(?:[^'\\\\\\n]|\\\\[^])*'", CHARACTER = "'(?:[^'\\\\\\n]|\\\\[^\\n]{1,8}?)'";
const TRIPLE = '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)', BACKTICK = "`(?:[^`\\\\]|\\\\[^])*`?";
const C = "auto bool break case catch char class const constexpr continue default delete do double else enum extern false float for friend goto if inline int long namespace new nullptr NULL operator private protected public return short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void volatile while";
const JS = "async await break case catch class const continue default delete do else export extends false finally for from function if import in instanceof interface let new null of return static super switch this throw true try type typeof undefined var void while yield";

/** name: [other names, comment, strings, words] */
const LANGUAGES = [
  ["python py", "hash", [TRIPLE, DOUBLE, SINGLE], "and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield"],
  ["javascript js jsx typescript ts tsx mjs", "slash", [DOUBLE, SINGLE, BACKTICK], JS],
  ["c cpp c++ h hpp cuda cu", "slash", [DOUBLE, CHARACTER], C],
  ["java kotlin kt csharp cs c# scala swift dart php", "slash", [DOUBLE, SINGLE], `${C} ${JS} abstract boolean final fun func guard implements import internal let object override package self String val var when`],
  ["rust rs", "slash", [DOUBLE, CHARACTER], "as async await bool break const continue crate dyn else enum extern false fn for i32 i64 if impl in let loop match mod move mut pub ref return self Self static str struct super trait true type u8 u32 u64 unsafe use usize where while"],
  ["go golang", "slash", [DOUBLE, CHARACTER, BACKTICK], "bool break byte case chan const continue default defer else error fallthrough false for func go goto if import int interface map nil package range return select string struct switch true type var"],
  ["bash sh shell zsh console", "hash", [DOUBLE, SINGLE], "case do done echo elif else esac exit export fi for function if in local read return set shift sudo then until while"],
  ["sql", "dash", [DOUBLE, SINGLE], "all alter and as asc between by case create delete desc distinct drop else end exists from full group having in index inner insert into is join key left like limit not null on or order outer primary right select set table then union unique update values view when where with"],
  ["yaml yml toml ini dockerfile make makefile ruby rb perl r julia jl", "hash", [DOUBLE, SINGLE], "begin class def do else elsif end false for function if in module nil null return true unless until using while yes no FROM RUN COPY CMD ENV WORKDIR"],
  ["lua haskell hs", "dash", [DOUBLE, SINGLE], "and case class data deriving do else elseif end false for function if import in instance let local module nil not of or repeat return then true type until where while"],
  ["json jsonc json5", "slash", [DOUBLE], "true false null"],
  ["css scss less", "star", [DOUBLE, SINGLE], ""],
  ["html xml svg vue", "tag", [DOUBLE], ""],
];

const made = new Map();  // language -> [pattern, its words]

function language(name) {
  if (made.has(name)) return made.get(name);
  const found = LANGUAGES.find(([names]) => names.split(" ").includes(name));
  let rules = null;
  if (found) {
    const pattern = `(${COMMENT[found[1]]})|(${found[2].join("|")})|\\b(\\d[\\w.]*)|([A-Za-z_]\\w*)`;
    rules = [new RegExp(pattern, "g"), new Set(found[3].split(" ")), name === "sql"];
  }
  made.set(name, rules);
  return rules;
}

/** The nodes of a block of code. */
export function coloured(text, name) {
  const rules = text.length <= LONGEST ? language(name.toLowerCase()) : null;
  if (!rules) return plain(text);
  const [pattern, words, anyCase] = rules, nodes = [];
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    const word = match[4];
    const kind = match[1] !== undefined ? "comment" : match[2] !== undefined ? "string" : match[3] !== undefined ? "number"
      : words.has(anyCase ? word.toLowerCase() : word) ? "word" : "";
    if (!kind) continue;
    if (match.index > at) nodes.push(...plain(text.slice(at, match.index)));
    nodes.push(h("span", { className: `code-${kind}` }, ...plain(match[0])));
    at = match.index + match[0].length;
  }
  return [...nodes, ...plain(text.slice(at))];
}
