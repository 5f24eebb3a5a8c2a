#!/bin/sh
# smg in front of replicas of Tympan, all that is asked for below added to what it is told:
#
#   pip install smg
#   sh deploy/smg.sh --host 0.0.0.0 --port 8000 --worker-urls http://10.0.0.1:8000 http://10.0.0.2:8000
#
# Probes: a replica that drains is out after two of them, which is within its --drain-grace (2 s), one that is ready again
# is in after one. By smg's own, a minute apart and two of them, replicas that restart in turn would be out together.
#
# The circuit breaker opens after ten failures in a row and would stay open for a minute, whatever the probes say.
#
# Three tries: smg runs a request again that ended with 504 (--request-timeout), and by itself up to five times. Uploads
# it never tries again: to end a replica without losing one, take it out of smg first, as deploy/roll.py does.
#
# Routing: what begins alike goes where it was computed. Turns that bring the same X-Session-Id stay together for sure.
exec smg launch \
    --policy cache_aware --sticky-sessions --routing-key-headers x-session-id \
    --health-check-endpoint /ready --health-check-interval-secs 1 \
    --health-success-threshold 1 --health-failure-threshold 2 \
    --cb-timeout-duration-secs 1 --retry-max-retries 3 \
    "$@"
