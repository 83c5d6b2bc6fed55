#!/usr/bin/env bash
# Installs Chromium and its driver for the tests of pages, where that is possible: on Debian and Ubuntu, as root.
# Without them those tests are skipped, so this never fails.
set -u
if command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Chromium here: the tests of pages will be skipped (install chromium and chromium-driver to run them)"
    exit 0
fi
echo "Installing Chromium for the tests of pages"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 ||
    echo "Chromium could not be installed: the tests of pages will be skipped"
exit 0
