#!/usr/bin/env bash
# First contact with a GPU, on a machine that has Python with torch and Triton, a C compiler, and nothing else of qmix:
#
#     benchmarks/first_contact.sh [SECONDS] [--out DIR]       560 seconds by default; the table is at the end
#     benchmarks/first_contact.sh --stand-in --out DIR        anywhere: the CPU in a GPU's place, to rehearse
#
# PYTHON names another interpreter than python3. See first_contact.py.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
exec "${PYTHON:-python3}" "$here/first_contact.py" "$@"
