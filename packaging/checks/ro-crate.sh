# The RO-Crate of a small output, by rocrate's reader and by the profile Process Run Crate of roc-validator.
# pip: rocrate==0.16.0 roc-validator==0.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/crate"
printf '>a\nMKVLAGW\n>empty\n' >"$work/crate/in.faa"
virnucpro embed "$work/crate/in.faa" -o "$work/crate/p.h5" --model random:8M --device cpu -q || [ $? = 3 ]
virnucpro inspect "$work/crate/p.h5" --ro-crate "$work/crate" --agent https://orcid.org/0000-0002-1825-0097 >"$work/inspect.txt"
env -u PYTHONPATH python - "$work/crate" <<'PYTHON'
import io
import sys
from pathlib import Path

import requests
import rocrate
from rocrate.rocrate import ROCrate
from rocrate_validator.services import ValidationSettings, validate
from rocrate_validator.models import Severity

folder = sys.argv[1]
crate = ROCrate(folder)
action = crate.root_dataset["mentions"]
assert [part.id for part in crate.root_dataset["hasPart"]] == ["p.h5", "in.faa"]
assert (action.type, action["result"].id, action["instrument"]["name"]) == ("CreateAction", "p.h5", "virnucpro")

# rocrate has the terms of RO-Crate 1.3, those of 1.1 among them: the validator needs no network
terms = (Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld").read_bytes()


def answer(self, request, **_):
    assert request.url == "https://w3id.org/ro/crate/1.1/context", request.url
    response = requests.Response()
    response.status_code, response.url, response.request = 200, request.url, request
    response.headers["Content-Type"] = "application/ld+json"
    response.raw = io.BytesIO(terms)
    return response


requests.adapters.HTTPAdapter.send = answer
found = validate(ValidationSettings(
    rocrate_uri=folder, profile_identifier="process-run-crate-0.5", requirement_severity=Severity.RECOMMENDED, no_cache=True
)).get_issues()
for issue in found:
    print(issue.severity.name, issue.check.identifier, issue.message, issue.violatingEntity)
known = {  # not known to the program: its page, and who published the crate
    "process-run-crate-0.5_3.2", "process-run-crate-0.5_5.1", "ro-crate-1.1_22.2", "ro-crate-1.1_22.3",
}
assert {issue.check.identifier for issue in found} <= known
PYTHON
