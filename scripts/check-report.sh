#!/usr/bin/env bash
# check-report.sh REPORT.html [SHOTS]: opens a report in headless Chromium as a file. Fails where
# the page says something on the console, asks for anything beyond itself, lacks a section, its
# scores or all pictures, or scrolls sideways at the width of a telephone. Screenshots at 1280 and
# 390 pixels, light and dark, go to the folder SHOTS (a temporary one, whose name is printed, where
# none is given).
#
# CHROMIUM   the browser (chromium)
set -euo pipefail
[ $# -ge 1 ] && [ -f "$1" ] || { echo "usage: check-report.sh REPORT.html [SHOTS]" >&2; exit 2; }
CHROMIUM=${CHROMIUM:-chromium}
command -v "$CHROMIUM" > /dev/null || { echo "check-report: no $CHROMIUM here (hint: apt-get install chromium)" >&2; exit 2; }
page=$(realpath "$1")
shots=${2:-$(mktemp -d)}
mkdir -p "$shots"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "check-report: $*" >&2; exit 1; }

# browse NAME ARGUMENTS...: the file $page; stdout and stderr to $work/NAME.out and .log, every
# request to $work/NAME.net
browse() {
    local name=$1; shift
    timeout 120 "$CHROMIUM" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$work/profile-$name" --enable-logging=stderr \
        --host-resolver-rules="MAP * ~NOTFOUND" \
        --log-net-log="$work/$name.net" "$@" "file://$page" > "$work/$name.out" 2> "$work/$name.log" \
        || { tail -n 5 "$work/$name.log" >&2; fail "the browser failed"; }
    ! grep ':CONSOLE' "$work/$name.log" >&2 || fail "the page says something on the console"
    [ -s "$work/$name.net" ] || fail "the browser wrote no list of requests"
    # No name is resolved, so nothing leaves this machine; what the browser asks of its maker is not
    # the page's.
    local others='"url":"(file|data|chrome|about|devtools):|"url":"https?://((accounts|www|([a-z]+[.])*clients[0-9]*)[.]google|(update|optimizationguide-pa)[.]googleapis)[.]com/'
    if grep -oE '"url":"[a-z-]+:[^"]*"' "$work/$name.net" | grep -vE "$others" | sort -u | grep . >&2; then
        fail "the page asked for something beyond itself"
    fi
}

browse dom --dump-dom
for id in scores seesaw overlap density training forgetting outputs provenance; do
    grep -q "<h2 id=\"$id\">" "$work/dom.out" || fail "the section $id is missing"
done
pictures=$(grep -c '<svg role="img"' "$work/dom.out" || true)
[ "$pictures" -gt 0 ] || fail "no picture is on the page"
scores=$(sed -n '/<section aria-labelledby="scores">/,/<\/section>/p' "$work/dom.out")
! grep 'class="missing"' <<< "$scores" >&2 || fail "the scores are missing"

# A copy that may run one script, which says how much wider than the window the page is.
sed -e 's/<meta http-equiv="Content-Security-Policy"[^>]*>//' \
    -e 's|</body>|<script>document.body.dataset.over = document.documentElement.scrollWidth - innerWidth</script></body>|' \
    "$page" > "$work/copy.html"
page=$work/copy.html browse wide --window-size=390,4000 --dump-dom
grep -q '<body data-over="0">' "$work/wide.out" || fail "at 390 pixels the page scrolls sideways: $(grep -o '<body data-over=[^>]*' "$work/wide.out")"

for width in 1280 390; do
    browse "light-$width" --window-size="$width,4000" --screenshot="$shots/light-$width.png"
    browse "dark-$width" --window-size="$width,4000" --blink-settings=preferredColorScheme=0 --screenshot="$shots/dark-$width.png"
done
[ "$(cksum < "$shots/light-1280.png")" != "$(cksum < "$shots/dark-1280.png")" ] || fail "dark looks like light"
echo "check-report: $pictures pictures, no message, no request beyond the file; screenshots in $shots"
