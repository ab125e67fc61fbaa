#!/bin/sh
# Builds the container image from static binaries, without a registry.
# usage: deploy/docker/build.sh [IMAGE]
set -e
cd "$(dirname "$0")/../.."
image="${1:-kvasir:dev}"
context="$(mktemp -d)"
trap 'rm -rf "$context"' EXIT
mkdir "$context/bin" "$context/data"
echo "building static binaries ..."
CGO_ENABLED=0 go build -trimpath -tags pebblegozstd -ldflags '-s -w' -o "$context/bin/" ./cmd/kvnode ./cmd/kvorch ./cmd/kvctl
cp deploy/docker/Dockerfile.local "$context/Dockerfile"
docker build -q -t "$image" "$context"
echo "built $image"
