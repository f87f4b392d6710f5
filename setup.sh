#!/usr/bin/env bash
# Checks this machine and makes the environment .venv in this folder. It changes nothing outside the folder.
#
#   ./setup.sh [CONFIG.py] [key=value ...]            check, then make .venv, then check what was made
#   ./setup.sh --check [CONFIG.py] [key=value ...]    only check: changes nothing at all
#
# CONFIG.py and key=value are train.py's: with bucket_name set, the bucket is listed. PYTHON=... chooses the interpreter.
# Exit code: 0 if training can run here, 1 if something that it needs is missing.
set -u
cd "$(dirname "$0")" || exit 1
export PYTHONDONTWRITEBYTECODE=1

only_check=false settings=()
for argument in "$@"; do
    case $argument in
        --check) only_check=true ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
        -*) echo "error: unknown option $argument; there is --check" >&2 && exit 2 ;;
        *) settings+=("$argument") ;;
    esac
done

missing=0
ok() { printf 'ok       %s\n' "$*"; }
note() { printf 'note     %s\n' "$*"; }
miss() { printf 'MISSING  %s\n' "$*" && missing=$((missing + 1)); }
fix() { printf '         %s\n' "$*"; }

find_python() { # the newest one that pyproject.toml allows, unless PYTHON names one
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

check_python() {
    python=$(find_python)
    if [ -z "$python" ]; then
        miss "Python 3.11, 3.12 or 3.13${PYTHON:+ (PYTHON=$PYTHON is none)}"
        fix "Debian, Ubuntu: sudo apt-get install python3 python3-venv python3-dev; elsewhere: uv, conda or python.org"
        return
    fi
    ok "Python $("$python" -c 'import platform; print(platform.python_version())') at $python"
    if ! command -v git >/dev/null; then
        miss "git, which checkpoints ask for the commit that they were made with"
        fix "Debian, Ubuntu: sudo apt-get install git"
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        miss "venv and ensurepip of this Python"
        fix "Debian, Ubuntu: sudo apt-get install python3-venv"
    fi
    local header
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
    if command -v c++ >/dev/null && [ -f "$header" ]; then
        ok "C++ compiler and Python headers, for compile_model=true"
    else
        note "no C++ compiler or no Python.h: compile_model=true will fail; compile_model=false works, slower"
        fix "Debian, Ubuntu: sudo apt-get install g++ python3-dev"
    fi
}

check_gpu() {
    local rows
    if ! command -v nvidia-smi >/dev/null; then
        note "no GPU: nvidia-smi is not here. CPU only: the demo and the tests run here"
        fix "needed for configs/production.py: 2 NVIDIA GPUs of 24 GB with their driver; for production_8gpu.py: 8 of 80 GB"
        fix "on a machine that has a GPU, install the driver: Debian, Ubuntu: sudo ubuntu-drivers install, or the cloud's image"
    elif ! rows=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1) || [ -z "$rows" ]; then
        miss "a working GPU driver: nvidia-smi says: $(head -n 1 <<<"$rows")"
        fix "reinstall the driver, or reboot if it was just updated"
    else
        ok "$(wc -l <<<"$rows") GPU(s): $(sort <<<"$rows" | uniq -c | sed 's/^ *//' | paste -sd ';')"
    fi
}

check_memory_and_disk() {
    local cores memory disk
    cores=$(getconf _NPROCESSORS_ONLN)
    memory=$(awk '/^MemTotal/ {printf "%d", $2 / 1048576}' /proc/meminfo 2>/dev/null)
    memory=${memory:-$(($(sysctl -n hw.memsize 2>/dev/null || echo 0) / 1073741824))}
    disk=$(df -Pk . | awk 'END {printf "%d", $4 / 1048576}')
    ok "$cores cores, $memory GiB of memory, $disk GiB free on this disk"
    if [ "$disk" -lt 10 ] && [ ! -x .venv/bin/python ]; then
        miss "disk space: PyTorch with its GPU libraries takes up to 10 GiB"
        fix "free some, or put this folder on a larger disk"
    fi
    if [ "$disk" -lt 70 ]; then
        note "a checkpoint of the 1.4 billion parameter model takes 17 GB, and save_total_limit=3 keeps 3 while the next is written"
        fix "set output_dir=, data_dir= and cache_dir= to a larger disk, or lower save_total_limit"
    fi
    if [ "$memory" -lt 32 ]; then
        note "that model's asynchronous checkpoints take 17 GB of host memory; async_save=false takes none, and training waits"
    fi
}

check_environment() {
    if [ ! -x .venv/bin/python ]; then
        $only_check && note "no .venv yet" && fix "./setup.sh makes it"
        return
    fi
    local found
    if found=$(.venv/bin/python - 2>&1 <<'PYTHON'
import importlib.metadata, pathlib, re
wrong = []
for line in pathlib.Path("requirements.txt").read_text().splitlines():
    if match := re.fullmatch(r"([\w-]+)==([\w.]+)", line.strip()):
        try:
            have = importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            have = "not installed"
        if have.split("+")[0] != match[2]:
            wrong.append(f"{match[1]} {have}, wanted {match[2]}")
raise SystemExit("; ".join(wrong) or 0)
PYTHON
    ); then
        ok ".venv has what requirements.txt names"
    else
        miss "packages in .venv: $(tail -n 1 <<<"$found")"
        fix "./setup.sh installs them"
        return
    fi
    if ! command -v nvidia-smi >/dev/null || ! grep -q '^torch' requirements.txt; then
        return
    fi
    if found=$(.venv/bin/python -W ignore -c '
import torch
assert torch.version.cuda, "this PyTorch is built for CPUs only"
torch.zeros(1, device="cuda")
print(f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPU(s), bf16:", torch.cuda.is_bf16_supported())' 2>&1); then
        ok "$found"
    else
        miss "PyTorch on the GPU: $(tail -n 1 <<<"$found")"
        fix "a driver that is too old is the usual reason: nvidia-smi shows the newest CUDA that it serves, at the top right"
    fi
}

check_speed() {
    local found
    if [ ! -x .venv/bin/python ] || [ ! -f refocused/measure/calibrate.py ]; then
        return
    fi
    if found=$(.venv/bin/python -W ignore -m refocused.measure.calibrate 2>&1); then
        ok "$(head -n 1 <<<"$found")"
        tail -n +2 <<<"$found" | while read -r line; do [ -z "$line" ] || note "$line"; done
    else
        note "the speed of this machine could not be measured: $(tail -n 1 <<<"$found")"
    fi
}

check_bucket() {
    if [ ${#settings[@]} -eq 0 ]; then
        return
    fi
    if [ ! -x .venv/bin/python ]; then
        note "the configuration and its bucket are looked at once .venv is there"
        return
    fi
    local found
    if found=$(.venv/bin/python - "${settings[@]}" 2>&1 <<'PYTHON'
import sys
sys.path.insert(0, "")
import configs
from refocused.bucket import gcs
try:
    cfg, _ = configs.load(sys.argv[1:])
    if not cfg.bucket_name:
        raise SystemExit(print("bucket_name is not set: data and checkpoints stay on this machine"))
    path = cfg.checkpoint_bucket_path.strip("/")
    count = len(gcs.Bucket(cfg.bucket_name, patience=20).list(path + "/" if path else ""))
    print(f"gs://{cfg.bucket_name}/{path} can be listed, {count:,} objects; whether it can be written, train.py finds out at start")
except ValueError as error:
    raise SystemExit(str(error))
PYTHON
    ); then
        ok "$found"
    else
        miss "bucket or configuration: $(tail -n 1 <<<"$found")"
        fix "credentials are Google's Application Default Credentials: the machine's service account, or gcloud auth application-default login"
    fi
}

check_python
check_gpu
check_memory_and_disk
if ! $only_check; then
    if [ "$missing" -gt 0 ]; then
        echo "Not installed: $missing thing(s) missing, see above." >&2
        exit 1
    fi
    echo "making .venv; PyTorch is large, this takes minutes"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
    # no cache: pip's would lie outside this folder
    .venv/bin/python -m pip install --disable-pip-version-check --no-cache-dir -r requirements.txt || exit 1
    touch .venv/runtime # what the Makefile looks at
fi
check_environment
check_speed
check_bucket
if [ "$missing" -gt 0 ]; then
    echo "$missing thing(s) missing, see above." >&2
    exit 1
fi
if $only_check; then
    echo "Nothing was changed."
else
    echo "Ready. Try: make train"
fi
