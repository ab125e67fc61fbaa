#!/bin/sh
# Checks the Prometheus profile with promtool, and scrapes a real cluster with it. Takes
# prometheus and promtool from the PATH, else out of Debian's package, which is unpacked
# below bin/ and not installed, as that would start a service. Skipped where neither is to
# be had.
set -e
cd "$(dirname "$0")/../.."
tools="$PWD/bin/prometheus/usr/bin"
unpack() { # fetches the package, from lists that may have to be fetched first
	command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
	mkdir -p bin/prometheus
	cd bin/prometheus
	echo "test-prometheus: fetching Debian's package"
	apt-get download prometheus >/dev/null 2>&1 ||
		{ [ "$(id -u)" -eq 0 ] && apt-get update >/dev/null 2>&1 && apt-get download prometheus >/dev/null 2>&1; } || return 1
	dpkg -x prometheus_*.deb . && rm prometheus_*.deb
}
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
	tools="$(dirname "$(command -v promtool)")"
elif [ ! -x "$tools/promtool" ] && ! (unpack); then
	echo "test-prometheus: SKIPPED, there is no promtool here and no Debian package to be had"
	exit 0
fi
make --no-print-directory build
KVASIR_PROMETHEUS="$tools" ${GO:-go} test -tags "${TAGS:-pebblegozstd}" -count=1 -timeout 10m -v ./deploy/prometheus
