#!/usr/bin/env bash
# Certificates for a Headrace cluster of one's own: an authority, and one certificate that scheduler, workers and clients
# share. Whoever has it can run code on the cluster, so give it to nobody else.
#
#   cluster/deploy/certificates.sh FOLDER [HOST ...]      HOST: names or IP addresses; default localhost and 127.0.0.1
#
# Writes four files into FOLDER: ca.pem, headrace.pem, headrace-key.pem and dask-tls.yaml. The last one tells Dask to use
# the others: it belongs into ~/.config/dask/ on every machine, clients' too, or is named in DASK_CONFIG.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

case ${1-} in
    -h | --help) usage; exit 0 ;;
    "" | -*) usage >&2; exit 2 ;;
esac
command -v openssl >/dev/null || { echo "certificates.sh needs openssl: install it first" >&2; exit 1; }
folder=$1
shift
hosts=("$@")
[[ ${#hosts[@]} -gt 0 ]] || hosts=(localhost 127.0.0.1)

names=()
for host in "${hosts[@]}"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=("IP:$host"); else names+=("DNS:$host"); fi
done
subject_names=$(IFS=,; echo "${names[*]}")

umask 077
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ -e $folder/headrace-key.pem ]]; then
    echo "$folder/headrace-key.pem is there already: remove it to make new certificates" >&2
    exit 1
fi
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 825 -subj "/CN=Headrace authority" \
    -keyout "$scratch/ca-key.pem" -out "$folder/ca.pem" 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=headrace" \
    -keyout "$folder/headrace-key.pem" -out "$scratch/headrace.csr" 2>/dev/null
openssl x509 -req -in "$scratch/headrace.csr" -CA "$folder/ca.pem" -CAkey "$scratch/ca-key.pem" \
    -CAserial "$scratch/ca.srl" -CAcreateserial -days 825 \
    -extfile <(echo "subjectAltName=$subject_names") -out "$folder/headrace.pem" 2>/dev/null
# The authority's key is thrown away: nobody can add a certificate later, a new set is made instead.

cat >"$folder/dask-tls.yaml" <<YAML
distributed:
  comm:
    require-encryption: true
    tls:
      ca-file: "$folder/ca.pem"
      scheduler: {cert: "$folder/headrace.pem", key: "$folder/headrace-key.pem"}
      worker: {cert: "$folder/headrace.pem", key: "$folder/headrace-key.pem"}
      client: {cert: "$folder/headrace.pem", key: "$folder/headrace-key.pem"}
YAML
echo "wrote ca.pem, headrace.pem, headrace-key.pem and dask-tls.yaml to $folder (for ${hosts[*]})"
echo "next: cp $folder/dask-tls.yaml ~/.config/dask/ on every machine, with the paths as they are there"
