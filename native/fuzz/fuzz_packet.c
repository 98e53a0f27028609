/* Invariant: what parses lies inside the buffer; parse then build gives it back but for reserved bits. */
/* SPDX-License-Identifier: BSD-3-Clause */
#include "fuzz/fuzz.h"
#include "wire/wire.h"

#include <errno.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t built[MG_HDR_MAX], again[MG_HDR_MAX], copy[4096];
	struct mg_hdrs h, g;
	size_t hdr_len;
	int err;

	if (size > sizeof(copy))
		return 0;
	memset(&h, 0, sizeof(h));
	memset(&g, 0, sizeof(g));
	err = mg_hdrs_parse(data, size, &h);
	FUZZ_CHECK(err == 0 || err == -EBADMSG);
	if (err)
		return 0;

	FUZZ_CHECK(mg_opinfo[h.opcode].name && h.mask == mg_opinfo[h.opcode].mask);
	hdr_len = mg_opinfo[h.opcode].hdr_len;
	FUZZ_CHECK(hdr_len <= MG_HDR_MAX);
	FUZZ_CHECK(h.payload == data + hdr_len);
	FUZZ_CHECK(hdr_len + h.payload_len + h.pad + MG_ICRC_LEN == size);
	FUZZ_CHECK(h.psn <= MG_PSN_MASK && h.dest_qpn <= MG_QPN_MASK && h.pad <= 3);

	FUZZ_CHECK(mg_hdrs_build(&h, built) == hdr_len);
	FUZZ_CHECK(memcmp(built, data, 4) == 0);
	memcpy(copy, data, size);
	memcpy(copy, built, hdr_len);
	FUZZ_CHECK(mg_hdrs_parse(copy, size, &g) == 0);
	FUZZ_CHECK(mg_hdrs_build(&g, again) == hdr_len && memcmp(built, again, hdr_len) == 0);
	g.payload = h.payload;
	FUZZ_CHECK(memcmp(&g, &h, sizeof(g)) == 0);
	return 0;
}
