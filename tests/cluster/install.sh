#!/usr/bin/env bash
# What the tests of this folder need, where it can be installed: root on Debian or Ubuntu. Elsewhere
# the tests say what is missing and are skipped.
set -euo pipefail

missing=()
command -v slurmctld > /dev/null || missing+=(slurm-wlm)
command -v munged > /dev/null || missing+=(munge)
command -v ch-run > /dev/null || missing+=(charliecloud)
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get > /dev/null; then
    echo "not installed, and not root on Debian: ${missing[*]}" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null 2>&1 \
    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } > /dev/null; }; then
    echo "could not be installed: ${missing[*]}" >&2
fi
