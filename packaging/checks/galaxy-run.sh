# By name only: it starts a server, and takes ten minutes.
# The tests of Galaxy's tools and of the data manager, in a Galaxy server of its own. virnucpro comes from the PATH; the data
# manager's test fetches the demo weights through pip.
# pip: galaxy-web-apps==26.1.2 galaxy-app==26.1.2 galaxy-test-driver==26.1.2 h5py==3.16.0
unset PYTHONDONTWRITEBYTECODE # the server starts Python several times for each job
packages=$(cd "$(dirname "$(command -v galaxy-web)")/.." && pwd)
work=$(mktemp -d)
tools=$work/galaxy
server=
trap '[ -z "$server" ] || { kill "$server"; wait "$server" || true; }; rm -rf "$work"' EXIT
cp -r packaging/galaxy "$tools" # the data manager adds rows to the table of the tests
cd "$work"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat >tools.xml <<END
<toolbox>
    <section id="virnucpro" name="virnucpro">
        <tool file="$tools/virnucpro/virnucpro_embed.xml"/>
        <tool file="$tools/virnucpro/virnucpro_predict.xml"/>
    </section>
</toolbox>
END
sed "s|tool_file=\"|&$tools/data_manager_virnucpro/|" "$tools/data_manager_virnucpro/data_manager_conf.xml" >data_managers.xml
echo '<dependency_resolvers/>' >resolvers.xml # no conda: virnucpro is there
cat >galaxy.yml <<END
galaxy:
  data_dir: $work/data
  tool_config_file: $work/tools.xml
  data_manager_config_file: $work/data_managers.xml
  galaxy_data_manager_data_path: $work/weights
  tool_data_table_config_path: $tools/virnucpro/tool_data_table_conf.xml.test
  dependency_resolvers_config_file: $work/resolvers.xml
  job_config: {runners: {local: {load: galaxy.jobs.runners.local:LocalJobRunner, workers: 2}}, execution: {default: here, environments: {here: {runner: local}}}}
  admin_users: test@example.org
  bootstrap_admin_api_key: $port
END
VIRTUAL_ENV=$packages galaxy-web -c galaxy.yml -b "127.0.0.1:$port" >server.log 2>&1 &
server=$!
key=$(python3 - "$port" <<'END'
import json, sys, time, urllib.error, urllib.request

def ask(path, **values):
    headers = {"x-api-key": sys.argv[1], "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/api/{path}", json.dumps(values).encode(), headers)
    return json.load(urllib.request.urlopen(request))

for _ in range(300):  # seconds, until the server answers
    try:
        user = ask("users", username="test", email="test@example.org", password="password")
        break
    except urllib.error.HTTPError as error:
        sys.exit(error.read().decode())
    except OSError:
        time.sleep(1)
print(ask(f"users/{user['id']}/api_key"))
END
) || { tail -20 server.log; exit 1; }
for tool in virnucpro_embed virnucpro_predict virnucpro_fetch; do
    galaxy-tool-test -u "http://127.0.0.1:$port" -k "$key" -t "$tool" --test-data "$tools/virnucpro/test-data" --parallel-tests 2 -j "$tool.json"
done
python3 - ./*.json <<'END'
import json, sys

for name in sys.argv[1:]:
    found = json.load(open(name))["results"]
    print(name, found)
    assert found["total"] and not found["errors"] + found["failures"] + found["skips"]
END
cat weights/virnucpro_models/demo/config.json # the data manager has moved the weights to their place
