#!/usr/bin/env bash
# Makes an environment with mergekit 0.1.5 beside the oracle's, whose torch and transformers it
# uses.
#
#   scripts/oracle/mergekit.sh [VENV [ORACLE_VENV]]
#   default: .cache/mergekit-venv .cache/oracle-venv
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.cache/mergekit-venv}
oracle=${2:-.cache/oracle-venv}
die() { printf 'oracle/mergekit: %s\n' "$*" >&2; exit 1; }
imports() { "$venv/bin/python" -c 'import mergekit.scripts.run_yaml' >/dev/null 2>&1; }

[ -x "$oracle/bin/python" ] || die "there is no $oracle (hint: scripts/oracle/setup.sh $oracle)"
if imports; then echo "oracle: $venv is ready"; exit; fi
[ -x "$venv/bin/python" ] || "$oracle/bin/python" -m venv "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$oracle" > "$(site "$venv")/oracle.pth"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# mergekit asks for older torch and transformers than the oracle has; what it needs beside them is
# light.
pip install -q pydantic==2.14.3 immutables==0.21 click==8.5.1 pyyaml psutil scipy==1.17.1
pip install -q --no-deps mergekit==0.1.5 peft==0.21.2 accelerate==1.15.0
"$venv/bin/python" -c 'import mergekit.scripts.run_yaml, importlib.metadata as m
print("oracle: mergekit", m.version("mergekit"))'
