# What the steps of test.sh are made of. Every wait is bounded.

step() { echo "test-compose: $(($(date +%s) - began)) s: $*"; }
fail() { echo "test-compose: FAILED: $*" >&2; exit 1; }

compose() { deploy/compose/compose.sh "$@" </dev/null; }

# kvctl through the published ports in $endpoints.
kvctl() { bin/kvctl --endpoints "$endpoints" "$@"; }

# in_network runs a command within the cluster's network, where nodes are known by their names.
in_network() { docker run --rm --network "${COMPOSE_PROJECT_NAME}_default" -e KVCTL_ENDPOINTS=node1:7400 "$KVASIR_IMAGE" "/bin/$@"; }

expect() { # expect WANT COMMAND...
	want="$1"; shift
	got="$("$@")" || fail "'$*' failed"
	[ "$got" = "$want" ] || fail "'$*' gave '$got', want '$want'"
}

within() { # within SECONDS CONDITION ARGUMENTS...: waits until the condition holds
	limit="$1"; shift
	until_at=$(($(date +%s) + limit))
	until "$@"; do
		[ "$(date +%s)" -lt "$until_at" ] || fail "after $limit s there is still no '$*'"
		sleep 1
	done
}

# container prints the container of a node or orchestrator, made by docker-compose or launched.
container() {
	id="$(docker ps -aq --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" --filter "label=com.docker.compose.service=$1")"
	[ -n "$id" ] || id="$(docker ps -aq --filter "label=io.kvasir.cluster=$COMPOSE_PROJECT_NAME" --filter "label=io.kvasir.node=$1")"
	echo "$id"
}

# members prints name, incarnation and number of slots of each node, sorted.
members() { kvctl node ls | awk '$1 ~ /^node/ {print $1 $2 ":" $NF}' | sort | xargs; }
count() { kvctl node ls | awk '$1 ~ /^node/' | wc -l; }
leader() { kvctl cluster status | awk '$1 ~ /^orch/ && $2 == "leader" {print $1}'; }
orchestrators_up() { [ "$(kvctl cluster status | awk '$1 ~ /^orch/ && ($2 == "leader" || $2 == "follower")' | wc -l)" -eq "$1" ]; }

# Conditions.
healthy() { [ "$(kvctl health 2>/dev/null | head -1)" = ok ]; }
noted() { kvctl events --limit 0 2>/dev/null | grep -q "$1"; }
container_healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$(container "$1")")" = healthy ]; }
holds() { kvctl cluster status 2>/dev/null | grep -q "$1"; }
gone() { [ -z "$(container "$1")" ] && ! docker volume inspect "${COMPOSE_PROJECT_NAME}_$1" >/dev/null 2>&1; }

counts() { [ "$(in_network kvctl report count 2>/dev/null)" = "$1" ]; } # the records of default, by a report

# whole: so many nodes, all of them healthy and with slots, and nothing under way.
whole() {
	[ "$(kvctl node ls 2>/dev/null | awk '$1 ~ /^node/ && $(NF-1) == "healthy" && $NF > 0' | wc -l)" -eq "$1" ] &&
		[ "$(count)" -eq "$1" ] && healthy && ! kvctl operation ls 2>/dev/null | grep -qE 'running|aborting'
}

# unchanged: the nodes are those of $before, incarnations and slots too, and healthy.
unchanged() { [ "$(members)" = "$before" ] && healthy; }

# load starts a generator in the cluster's network, bounded by its duration.
load() { # load DURATION CALLERS
	docker run -d --name "$COMPOSE_PROJECT_NAME-load" --network "${COMPOSE_PROJECT_NAME}_default" "$KVASIR_IMAGE" \
		/bin/kvctl --endpoints node1:7400,node3:7400,node4:7400 --timeout 20s \
		bench --duration "$1" --threads "$2" --reads 0.5 --distribution uniform --records 1000 --value-bytes 200 --fill >/dev/null
}
# end_load ends it before its time, and tells what it measured. It fails if an operation did.
end_load() {
	docker kill -s INT "$COMPOSE_PROJECT_NAME-load" >/dev/null 2>&1 || true # it has ended already
	code="$(timeout 60 docker wait "$COMPOSE_PROJECT_NAME-load")" || fail "the load does not end"
	docker logs "$COMPOSE_PROJECT_NAME-load" 2>&1 | grep -v '^$'
	docker rm -fv "$COMPOSE_PROJECT_NAME-load" >/dev/null
	[ "$code" -eq 0 ] || fail "the load ended with code $code"
}

# move takes a container from one network to the other, where it has the same name.
move() { # move SERVICE FROM TO
	docker network connect --alias "$1" "$3" "$(container "$1")"
	docker network disconnect "$2" "$(container "$1")"
}

# How many events there were, and those that came after so many.
since_number() { kvctl events --limit 0 | wc -l; }
events_since() { kvctl events --limit 0 | tail -n "+$(($1 + 1))" | sed 's/^/    /'; }
