#!/usr/bin/env bash
# The tests of pages drive a headless Chromium and are skipped without one. In CI (the variable CI is set), or where it
# is asked for (INSTALL_BROWSER=1), this installs it, on Debian and Ubuntu as root; elsewhere it only says how. It never
# fails.
set -u
if command -v chromedriver >/dev/null && { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
    exit 0
fi
if [ -n "${CI:-}${INSTALL_BROWSER:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing Chromium for the tests of pages"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 && exit 0
    echo "Chromium could not be installed."
fi
echo "No Chromium with chromedriver here: the tests of pages are skipped. make test INSTALL_BROWSER=1 installs both"
echo "as root, or: apt-get install chromium chromium-driver"
