#!/usr/bin/env bash
# Owns the submission of one run to a running Ray cluster: stage code and config, submit, follow, exit as the run did.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/ray-job.sh CONFIG OUT [arguments of `dist-mlpl train`...]

Submits CONFIG (a YAML file or URL) to a Ray cluster, follows it, and exits as the run did.
The same CONFIG and OUT again: the run goes on from its last commit.

  CONFIG   resolved here, so whatever it `extends` need not be on the cluster; shards (data.manifest) must be
           an absolute path or URL that every node reads
  OUT      run folder: a URL, or an absolute path on storage that every node shares
  e.g.     launch/ray-job.sh configs/ucm.yaml s3://BUCKET/runs/ucm --set data.manifest=s3://BUCKET/ucm

environment:
  RAY_API_SERVER_ADDRESS, RAY_ADDRESS   the dashboard, http(s)://HOST:PORT; http://127.0.0.1:8265 if neither is set
  RAY_AUTH_MODE                         token (default) or disabled
  RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH   the cluster's token, or a file that holds it; else ~/.ray/auth_token
  MLPL_PYTHON                           interpreter on the cluster (default python3)
  MLPL_FORWARD                          names of variables to hand to the run, separated by spaces; none otherwise.
                                        Whoever may use the dashboard can read them: no credentials, if you can
  MLPL_LOOK_SECONDS                     seconds between looks at the job's state while its log is shown (default 30)
  MLPL_BIN                              folder of `ray` and `dist-mlpl` here; else PATH, else .venv/bin

exit: as `dist-mlpl train` (0 done, 2 config, 3 data, 4 run), 130 stopped, 2 wrong usage, 1 not submitted or lost sight of
END
}

say() { printf 'ray-job: %s\n' "$*" >&2; }

refuse() { # what is wrong, what to do
    say "$1"
    say "$2"
    say "\`launch/ray-job.sh --help\` explains every argument and variable"
    exit 2
}

find_tool() {
    local name=$1
    if [[ -n ${MLPL_BIN:-} ]]; then
        [[ -x $MLPL_BIN/$name ]] || refuse "no $name in MLPL_BIN ($MLPL_BIN)" "point MLPL_BIN at the folder that holds it"
        printf '%s\n' "$MLPL_BIN/$name"
    elif ! type -P "$name"; then
        [[ -x $root/.venv/bin/$name ]] || refuse "no $name on PATH" "run \`make setup\`, or activate the environment"
        printf '%s\n' "$root/.venv/bin/$name"
    fi
}

check_arguments() {
    [[ $out =~ ^/[^/] || $out =~ ^[A-Za-z][A-Za-z0-9+.-]*://. ]] || refuse "OUT is '$out'" \
        "give a URL, or an absolute path on storage that all nodes share"
    local argument
    for argument in "$@"; do
        case $argument in
            --out | --out=* | --address | --address=* | --local)
                refuse "$argument among the extra arguments" "leave it out: OUT and the cluster are set by this script" ;;
        esac
    done
}

check_cluster() {
    [[ $address =~ ^https?://[^/] ]] || refuse "the cluster's address is '$address'" \
        "set RAY_API_SERVER_ADDRESS to its dashboard, say http://127.0.0.1:8265"
    case $RAY_AUTH_MODE in
        disabled) ;;
        token)
            if [[ -n ${RAY_AUTH_TOKEN:-} ]]; then
                return
            elif [[ -n ${RAY_AUTH_TOKEN_PATH:-} ]]; then
                [[ -r $RAY_AUTH_TOKEN_PATH ]] || refuse "no file at RAY_AUTH_TOKEN_PATH ($RAY_AUTH_TOKEN_PATH)" \
                    "point it at a file that holds the cluster's token"
            elif [[ ! -r ${HOME:-}/.ray/auth_token ]]; then
                refuse "no token: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token are all missing" \
                    "set one of them to the cluster's token, or RAY_AUTH_MODE=disabled for a cluster without"
            fi ;;
        *) refuse "RAY_AUTH_MODE is '$RAY_AUTH_MODE'" "set it to token or disabled" ;;
    esac
}

json_string() {
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\r'/\\r}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# Ray kills a job 3 s after it was told to stop unless this variable says otherwise; a commit may take longer.
write_runtime_env() {
    local name
    printf '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"'
    for name in ${MLPL_FORWARD:-}; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || refuse "MLPL_FORWARD names '$name'" \
            "give names of variables, separated by spaces"
        [[ -n ${!name+set} ]] || refuse "MLPL_FORWARD names $name, which is not set" "export it, or leave it out"
        printf ', %s: %s' "$(json_string "$name")" "$(json_string "${!name}")"
    done
    printf '}}\n'
}

# The working directory of the run on every node: this checkout's packages and the resolved config.
stage_working_directory() {
    mkdir "$stage/run"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$dist_mlpl" config show "$config" >"$stage/run/run.yaml"
    tar -C "$root" --exclude=__pycache__ -cf - dist_mlpl shards | tar -C "$stage/run" -xf -
}

# Shards by a relative path would be looked for in the staged working directory, minutes later and on another machine.
check_manifest() {
    local previous="" argument given="" line
    for argument in "$@"; do
        case $argument in
            --set=data.manifest=*) given=${argument#--set=data.manifest=} ;;
            data.manifest=*) [[ $previous != --set ]] || given=${argument#data.manifest=} ;;
        esac
        previous=$argument
    done
    if [[ -z $given ]]; then # the config's: one, or one a line if sets are mixed
        given=$(sed -n '/^data:/,/^[^ ]/s/^ *\(- \)\{0,1\}manifest: //p' "$stage/run/run.yaml")
    fi
    while IFS= read -r line; do
        line=${line//[\"\']/}
        case $line in
            "" | null | \[* | /* | *://*) ;;
            *) refuse "data.manifest is '$line'" \
                "give a URL, or an absolute path that every node reads: --set data.manifest=URL" ;;
        esac
    done <<<"$given"
}

# Sets `ended` to the exit status of a job that has ended, and to nothing before; fails without an answer.
ask() {
    ended=""
    answer=$(timeout 60 "$ray" job status "$id" 2>&1) || return 1
    case $answer in
        *"Job '$id' failed"*)
            ended=4
            [[ ! $answer =~ "failed with exit code "([0-9]+) ]] || ended=${BASH_REMATCH[1]} ;;
        *"Job '$id' succeeded"*) ended=0 ;;
        *"Job '$id' was stopped"*) ended=130 ;;
        *"Status for job '$id': "*) ;;
        *) return 1 ;;
    esac
}

# Waits for the end of the log, at most so many seconds; fails if it has come.
log_goes_on() {
    local deadline=$((SECONDS + $1))
    while kill -0 "$logs" 2>/dev/null; do
        ((SECONDS < deadline)) || return 0
        sleep 0.2
    done
    return 1
}

# `ray job logs` ends when the job does, or when the connection drops, and may hang where the head vanishes;
# `ray job status`, asked now and then, tells which it was.
follow() {
    local unanswered=0
    while :; do
        ended=""
        "$ray" job logs --follow "$id" &
        logs=$!
        while [[ -z $ended ]] && ((unanswered <= 5)) && log_goes_on "$look_seconds"; do
            if ask; then unanswered=0; else unanswered=$((unanswered + 1)); fi
        done
        [[ -z $ended ]] || log_goes_on "$((look_seconds < 10 ? look_seconds : 10))" || true # its last lines
        kill "$logs" 2>/dev/null || true
        wait "$logs" 2>/dev/null || true
        logs=""
        if [[ -z $ended ]] && ((unanswered <= 5)); then
            if ask; then unanswered=0; else unanswered=$((unanswered + 1)); fi
        fi
        [[ -z $ended ]] || return "$ended"
        if ((unanswered > 5)); then
            printf '%s\n' "$answer" >&2
            say "lost sight of the job; it may still run. Look with: ray job status $id"
            exit 1
        fi
        say "the connection ended before the job; following it again, from the start of its log"
        sleep 5
    done
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
fi
if (($# < 2)); then
    usage >&2
    exit 2
fi
config=$1 out=$2
shift 2
address=${RAY_API_SERVER_ADDRESS:-${RAY_ADDRESS:-http://127.0.0.1:8265}}
export RAY_API_SERVER_ADDRESS=$address RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
look_seconds=${MLPL_LOOK_SECONDS:-30}
[[ $look_seconds =~ ^[1-9][0-9]*$ ]] || refuse "MLPL_LOOK_SECONDS is '$look_seconds'" "give whole seconds, at least 1"
check_arguments "$@"
check_cluster
ray=$(find_tool ray)
dist_mlpl=$(find_tool dist-mlpl)

stage=$(mktemp -d "${TMPDIR:-/tmp}/mlpl-job.XXXXXX")
logs="" # process that shows the log
trap 'rm -rf "$stage"; [[ -z $logs ]] || kill "$logs" 2>/dev/null || true' EXIT
write_runtime_env >"$stage/runtime-env.yaml" # a file: an argument would show in the list of processes
stage_working_directory
check_manifest "$@"

# OUT without its scheme, so s3://bucket/runs/ucm is bucket-runs-ucm in every attempt; Ray refuses a used submission id.
run_name=$(printf '%s' "${out#*://}" | tr -cs 'A-Za-z0-9._' '-' | tail -c 80 | sed 's/^-*//; s/-*$//')
id=$run_name-$(date -u +%Y%m%dT%H%M%SZ)-$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
say "submitting $id to $address"
tries=0
until "$ray" job submit --no-wait --submission-id "$id" \
    --metadata-json "{\"job_name\": $(json_string "$run_name"), \"out\": $(json_string "$out")}" \
    --runtime-env "$stage/runtime-env.yaml" --working-dir "$stage/run" \
    -- "${MLPL_PYTHON:-python3}" -m dist_mlpl.cli train run.yaml --out "$out" --address auto "$@" >"$stage/answer" 2>&1; do
    # The dashboard of a cluster that has just started answers before a node is there to take jobs.
    tries=$((tries + 1))
    if ((tries <= 12)) && grep -q "No available agent" "$stage/answer"; then
        ((tries > 1)) || say "the cluster has no node yet that takes jobs; trying again"
        sleep "$((look_seconds < 5 ? look_seconds : 5))"
        continue
    fi
    cat "$stage/answer" >&2
    if ! ask; then
        say "$address did not take the job: is it the cluster's dashboard, and the token (RAY_AUTH_MODE=$RAY_AUTH_MODE) the cluster's? If only its answer was lost: ray job status $id"
        exit 1
    fi
    say "the answer to the submission was lost, but the job is there"
    break
done
rm -rf "$stage"
say "Ctrl-C ends this display and leaves the run alone. With RAY_API_SERVER_ADDRESS=$address RAY_AUTH_MODE=$RAY_AUTH_MODE:"
say "  follow again          ray job logs -f $id"
say "  stop, with a commit   ray job stop $id"

status=0
follow || status=$?
case $status in
    0) say "$id returned; \`dist-mlpl audit $out\` proves what it trained on" ;;
    130) say "$id was stopped; the same command goes on from the last commit in $out" ;;
    *) say "$id ended with $status; its log above says why. The same command goes on from the last commit in $out" ;;
esac
exit "$status"
