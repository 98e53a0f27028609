# SPDX-License-Identifier: BSD-3-Clause
# shellcheck shell=bash
# Sourced by scripts/criu and scripts/docker: an apt with lists, cache and an empty dpkg status of its own,
# whose only source is the machine's own mirror with another suite. It gives exact closures, libc included;
# nothing of the system is read or changed. The caller has set $work, a directory that it removes.

. /etc/os-release

# The machine's own mirror, as apt knows it.
mirror() {
	apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
		awk -v code="${VERSION_CODENAME:-}" '($2 == code || $3 == code) && $1 ~ /^(https?|mirror|file|copy)/ {
			print $1; exit }'
}

find_mirror() { # set $uri; false: apt names none
	uri=$(mirror)
	if [ -z "$uri" ]; then apt-get update -qq || true; uri=$(mirror); fi
	[ -n "$uri" ]
}

private_apt() { # private_apt SUITE COMPONENTS: set up $apt
	mkdir -p "$work"/lists/partial "$work"/cache/archives/partial "$work"/etc
	: >"$work/status"
	local options=
	keyring=
	for ring in /usr/share/keyrings/{debian,ubuntu}-archive-keyring.{pgp,gpg}; do
		if [ "$ring" = "/usr/share/keyrings/${ID:-debian}-archive-keyring.${ring##*.}" ] && [ -e "$ring" ]; then
			keyring=$ring options="[signed-by=$ring]"
			break
		fi
	done
	printf '%s\n' "deb $options $uri $1 $2" "deb-src $options $uri $1 $2" >"$work/etc/sources.list"
	apt=(apt-get -q -y -o "Dir::State=$work" -o "Dir::State::lists=$work/lists" -o "Dir::State::status=$work/status"
		-o "Dir::Cache=$work/cache" -o "Dir::Etc::sourcelist=$work/etc/sources.list"
		-o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
		-o APT::Default-Release= -o APT::Sandbox::User=root -o Acquire::Languages=none
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false -o APT::Install-Recommends=false
		-o Debug::NoLocking=1 -o APT::Update::Post-Invoke-Success= -o DPkg::Post-Invoke= -o APT::Update::Post-Invoke=)
}

update() { # the signature is always checked; only an expired mirror snapshot is forgiven
	"${apt[@]}" update >"$work/log" 2>&1 && ! grep -q '^[WE]: .*\(not signed\|NO_PUBKEY\|Failed\)' "$work/log" ||
		"${apt[@]}" -o Acquire::Check-Valid-Until=false -o Acquire::Check-Date=false update >"$work/log" 2>&1
}
