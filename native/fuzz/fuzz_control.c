/* Invariant: a message is taken whole or refused, its values are in range, and appended bytes change nothing. */
/* SPDX-License-Identifier: BSD-3-Clause */
#include "control/control.h"
#include "fuzz/fuzz.h"
#include "wire/wire.h"

#include <errno.h>

static void put_length(uint8_t *msg, size_t len)
{
	const uint32_t body = (uint32_t)(len - MG_CTL_HEADER_LEN);

	for (int i = 0; i < 4; i++)
		msg[8 + i] = (uint8_t)(body >> (8 * i));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct mg_ctl_msg msg, longer;
	uint8_t copy[MG_CTL_MAX_LEN];
	int err;

	err = mg_ctl_parse(data, size, &msg);
	FUZZ_CHECK(err == 0 || err == EBADMSG);
	if (!err && msg.type == MG_CTL_WELCOME) {
		const struct mg_ctl_welcome *w = &msg.welcome;

		FUZZ_CHECK(w->n_sockets <= MG_CTL_MAX_FDS);
		FUZZ_CHECK(w->status || (w->qpn_count > 0 && w->qpn_base <= MG_QPN_MASK &&
					 (uint64_t)w->qpn_base + w->qpn_count <= MG_QPN_MASK + 1u));
	}
	if (!err && msg.type == MG_CTL_SOCKETS)
		FUZZ_CHECK(msg.sockets.n_sockets <= MG_CTL_MAX_FDS);
	if (size < MG_CTL_HEADER_LEN || size + 8 > sizeof(copy))
		return 0;

	/* The header made right by us: gets the fuzzer past it, and says nothing new to a good message. */
	memcpy(copy, data, size);
	memcpy(copy, "MGR1", 4);
	copy[6] = MG_CTL_VERSION;
	copy[7] = 0;
	put_length(copy, size);
	err = mg_ctl_parse(copy, size, &msg);
	if (err)
		return 0;
	memset(copy + size, 0xa5, 8);
	put_length(copy, size + 8);
	FUZZ_CHECK(mg_ctl_parse(copy, size + 8, &longer) == 0);
	FUZZ_CHECK(memcmp(&msg, &longer, sizeof(msg)) == 0);
	FUZZ_CHECK(mg_ctl_parse(copy, size, &longer) == EBADMSG); /* the claimed length is checked */
	return 0;
}
