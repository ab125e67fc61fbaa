#!/bin/sh
# Tests the compose cluster: as it is, then with orchestrators that launch and end nodes.
# Containers are killed, deleted and paused, networks are cut, load comes and goes; after
# each step the cluster is whole again by itself. Skipped where no Docker engine answers.
set -e
cd "$(dirname "$0")/../.."
if ! docker info >/dev/null 2>&1; then
	echo "test-compose: SKIPPED, no Docker engine answers"
	exit 0
fi
export COMPOSE_PROJECT_NAME="kvasir-test-$$" KVASIR_IMAGE="kvasir:test-$$"
# Ports of their own, so that a cluster that is running is left alone.
for i in 1 2 3 4 5 6; do export "KVASIR_PORT_$i=$((7700 + 10 * (i - 1)))"; done
all=127.0.0.1:7700,127.0.0.1:7710,127.0.0.1:7720,127.0.0.1:7730,127.0.0.1:7740
endpoints=$all
main="${COMPOSE_PROJECT_NAME}_default" cut="${COMPOSE_PROJECT_NAME}_cut"
replace_after=20
began=$(date +%s)
. deploy/compose/lib.sh

cleanup() {
	status=$?
	trap - EXIT
	if [ $status -ne 0 ]; then
		for show in "cluster status" "capacity explain" "events"; do kvctl $show 2>&1 || true; done
		compose logs --no-color --tail=8 2>&1 || true
	fi
	docker rm -fv "$COMPOSE_PROJECT_NAME-load" >/dev/null 2>&1 || true
	compose down >/dev/null 2>&1 || status=1
	docker network rm "$cut" >/dev/null 2>&1 || true
	docker rmi "$KVASIR_IMAGE" >/dev/null 2>&1 || true
	left="$(docker ps -aq --filter "name=$COMPOSE_PROJECT_NAME"; docker volume ls -q --filter "name=$COMPOSE_PROJECT_NAME"; docker network ls -q --filter "name=$COMPOSE_PROJECT_NAME")"
	if [ -n "$left" ]; then echo "test-compose: left behind:" $left; status=1; fi
	[ $status -ne 0 ] || step "passed"
	exit $status
}

plain() {
	step "starting 3 orchestrators, 5 nodes and a reporting node"
	compose up
	within 120 healthy
	step "put and get through node1's port"
	bin/kvctl --endpoints 127.0.0.1:7700 put greeting hello
	expect hello bin/kvctl --endpoints 127.0.0.1:7700 get greeting
	expect hello kvctl get greeting -r all
	step "a report, with the reporting node's container killed in between"
	kvctl namespace set default --reporting degrade >/dev/null
	within 60 counts 1
	docker kill "$(container report1)" >/dev/null
	kvctl --timeout 10s put meanwhile written >/dev/null
	if in_network kvctl report count >/dev/null 2>&1; then fail "a report was answered without a reporting node"; fi
	docker start "$(container report1)" >/dev/null
	within 60 counts 2
	kvctl namespace set default --reporting off >/dev/null
	step "killing node2's container"
	docker kill "$(container node2)" >/dev/null
	expect hello bin/kvctl --endpoints 127.0.0.1:7700 get greeting
	kvctl put greeting again
	expect again kvctl get greeting
	step "waiting for the containers' own health checks"
	within 60 container_healthy orch1
	within 60 container_healthy node1
	expect 65532:65532 docker inspect -f '{{.Config.User}}' "$(container node1)"
	if docker inspect -f '{{json .Mounts}}' "$(container orch1)" | grep -q docker.sock; then fail "the plain cluster has the engine's socket"; fi
	docker start "$(container node2)" >/dev/null
	within 60 healthy
}

autonomy() {
	step "restarting the orchestrators, with a provisioner"
	compose autonomy
	within 90 orchestrators_up 3
	expect 65532:65532 docker inspect -f '{{.Config.User}}' "$(container orch1)"
	kvctl config set -f - <<-RULES
		replace_after: ${replace_after}s
		auto_scaling_group:
		  min_capacity: 5
		  max_capacity: 6
		  target_cpu_utilization: off
		  target_operations: 20
		  scale_up_cooldown: 5s
		  scale_down_cooldown: 5s
	RULES
	within 60 whole 5
}

paused_for_a_moment() {
	before="$(members)"
	step "pausing node4 for less than replace_after"
	docker pause "$(container node4)" >/dev/null
	within 60 holds 'node4 is down'
	docker unpause "$(container node4)" >/dev/null
	within 60 unchanged
}

partition() {
	lead="$(leader)"
	[ -n "$lead" ] || fail "no orchestrator leads"
	before="$(members)" from="$(since_number)"
	step "cutting off zone z2, node2 and node5, with $lead, which leads"
	docker network create "$cut" >/dev/null
	for s in node2 node5 "$lead"; do move "$s" "$main" "$cut"; done
	endpoints=127.0.0.1:7700,127.0.0.1:7720,127.0.0.1:7730 # node1, node3, node4
	within 90 holds '2 of 5 nodes are unhealthy.*no node is replaced'
	step "the majority goes on for longer than replace_after"
	until_at=$(($(date +%s) + replace_after + 10)) i=0
	while [ "$(date +%s)" -lt $until_at ]; do
		i=$((i + 1))
		kvctl put "cut-$i" "$i" >/dev/null
		expect "$i" kvctl get "cut-$i"
		sleep 0.2
	done
	if bin/kvctl --endpoints 127.0.0.1:7710 --timeout 3s put minority alone >/dev/null 2>&1; then fail "the minority took a write at a quorum"; fi
	holds '2 of 5 nodes are unhealthy' || fail "nothing says that nothing is replaced"
	step "$i writes and reads; healing"
	for s in node5 "$lead" node2; do move "$s" "$cut" "$main"; done
	docker network rm "$cut" >/dev/null
	within 120 unchanged
	endpoints=$all
	within 60 orchestrators_up 3
	within 60 unchanged
	expect "$i" bin/kvctl --endpoints 127.0.0.1:7710 get "cut-$i" -r all
	events_since "$from"
	if events_since "$from" | grep -qE 'to be launched|takes the place|take over'; then fail "a node was replaced"; fi
}

scaling() {
	from="$(since_number)"
	step "raising the load: above 20 operations a second and node"
	load 120s 8
	within 120 whole 6
	step "6 nodes; dropping the load"
	end_load
	within 300 whole 5
	events_since "$from"
	[ "$(events_since "$from" | grep -c 'to be launched, for 6 nodes')" -eq 1 ] || fail "it did not scale up once, to 6 nodes"
	noted 'as fewer nodes are enough' || fail "it did not scale down by load"
	expect again kvctl get greeting
}

# A node is lost, and another one takes its place with no command given.
replaced() { # replaced NODE COMMAND...
	lost="$1"; shift
	from="$(since_number)"
	kvctl config set auto_scaling_group.max_capacity 5 >/dev/null # this is not about load
	step "$* $lost, under load"
	load 180s 2
	within 30 running_load
	"$@" "$(container "$lost")" >/dev/null
	within 180 noted "$lost has ended"
	within 60 whole 5
	end_load
	gone "$lost" || fail "$lost has left a container or a volume"
	events_since "$from"
	step "replaced: $(members)"
}
running_load() { [ "$(kvctl cluster status | awk '$1 ~ /^node/ && $(NF-4) > 1' | wc -l)" -ge 1 ]; }
others() { kvctl node ls | awk '$1 ~ /^node/ && $1 != "node1" {print $1}'; } # node1's port is used
delete() { docker rm -f "$1" && docker volume rm "${COMPOSE_PROJECT_NAME}_$lost"; }

trap cleanup EXIT
trap 'exit 1' INT TERM
make --no-print-directory build
deploy/docker/build.sh "$KVASIR_IMAGE"
plain
autonomy
paused_for_a_moment
partition
scaling
replaced "$(others | head -1)" delete
replaced "$(others | tail -1)" docker pause # the one that was launched just now
expect again kvctl get greeting
