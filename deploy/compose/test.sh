#!/bin/sh
# Starts the compose cluster, writes and reads through a container's port, kills one
# container, and reads and writes again. Skipped where no Docker engine answers.
set -e
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then
	echo "test-compose: SKIPPED, no Docker engine answers"
	exit 0
fi
if docker compose version >/dev/null 2>&1; then compose="docker compose"; else compose="docker-compose"; fi
export COMPOSE_PROJECT_NAME="kvasir-test-$$" KVASIR_IMAGE="kvasir:test-$$"
# Ports of their own, so that a cluster that is running is left alone.
for i in 1 2 3 4 5; do export "KVASIR_PORT_$i=$((7700 + 10 * (i - 1)))"; done
file=deploy/compose/docker-compose.yml
endpoints=127.0.0.1:7700,127.0.0.1:7710,127.0.0.1:7720,127.0.0.1:7730,127.0.0.1:7740
kvctl() { bin/kvctl --endpoints "$endpoints" "$@"; }
step() { echo "test-compose: $*"; }
cleanup() {
	status=$?
	if [ $status -ne 0 ]; then $compose -f $file logs --tail=20 2>&1 || true; fi
	$compose -f $file down -v >/dev/null 2>&1 || true
	docker rmi "$KVASIR_IMAGE" >/dev/null 2>&1 || true
	exit $status
}
trap cleanup EXIT
trap 'exit 1' INT TERM

make --no-print-directory build
deploy/docker/build.sh "$KVASIR_IMAGE"
$compose -f $file config -q
step "starting 3 orchestrators and 5 nodes"
$compose -f $file up -d
tries=0
until kvctl health >/dev/null 2>&1; do
	tries=$((tries + 1))
	[ $tries -le 60 ] || { echo "test-compose: the cluster is not healthy after a minute"; kvctl cluster status || true; exit 1; }
	sleep 1
done
expect() { # expect WANT COMMAND...
	want="$1"; shift
	got="$("$@")"
	[ "$got" = "$want" ] || { echo "test-compose: '$*' gave '$got', want '$want'"; exit 1; }
}
step "put and get through node1's port"
bin/kvctl --endpoints 127.0.0.1:7700 put greeting hello
expect hello bin/kvctl --endpoints 127.0.0.1:7700 get greeting
expect hello kvctl get greeting -r all
step "killing node2's container"
docker kill "$($compose -f $file ps -q node2)" >/dev/null
expect hello bin/kvctl --endpoints 127.0.0.1:7700 get greeting
kvctl put greeting again
expect again kvctl get greeting
step "waiting for the containers' own health checks"
tries=0
for name in orch1 node1; do
	id="$($compose -f $file ps -q $name)"
	until [ "$(docker inspect -f '{{.State.Health.Status}}' "$id")" = healthy ]; do
		tries=$((tries + 1))
		[ $tries -le 60 ] || { echo "test-compose: $name is not healthy"; exit 1; }
		sleep 1
	done
done
user="$(docker inspect -f '{{.Config.User}}' "$($compose -f $file ps -q node1)")"
[ "$user" = "65532:65532" ] || { echo "test-compose: node1 runs as '$user'"; exit 1; }
step "passed"
