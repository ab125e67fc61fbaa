#!/bin/sh
# Runs docker-compose, whichever version there is, on the cluster of this directory.
# usage: compose.sh [up|autonomy|down|COMMAND...]
#   up        start it
#   autonomy  start it, or go on, with orchestrators that launch and end nodes
#   down      remove it, with the nodes that were launched and all data
set -e
cd "$(dirname "$0")"
export COMPOSE_PROJECT_NAME="${COMPOSE_PROJECT_NAME:-compose}"
if docker compose version >/dev/null 2>&1; then compose="docker compose"; else compose="docker-compose"; fi
case "$1" in
up) exec $compose -f docker-compose.yml up -d ;;
autonomy)
	DOCKER_GID="${DOCKER_GID:-$(stat -c %g "${DOCKER_SOCKET:-/var/run/docker.sock}")}"
	export DOCKER_GID
	exec $compose -f docker-compose.yml -f autonomy.yml up -d
	;;
down)
	# First those who would launch nodes anew.
	$compose -f docker-compose.yml rm --stop --force orch1 orch2 orch3
	label="label=io.kvasir.cluster=$COMPOSE_PROJECT_NAME"
	docker ps -aq --filter "$label" | xargs -r docker rm --force --volumes >/dev/null
	$compose -f docker-compose.yml down --volumes
	docker volume ls -q --filter "$label" | xargs -r docker volume rm >/dev/null
	;;
*) exec $compose -f docker-compose.yml "$@" ;;
esac
