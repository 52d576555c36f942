#!/usr/bin/env bash
# Looks at reports in headless Chromium: installs it and its driver (Debian or Ubuntu, as root), then runs the tests.
# In an environment in which the package is installed with its extra `test`.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v chromedriver > /dev/null; then
    apt-get update -q
    apt-get install -y -q --no-install-recommends chromium chromium-driver
fi
pip install -q selenium
pytest -q -m browser python_tests/report "$@"
