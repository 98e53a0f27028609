/* Invariant: a sealed packet checks whatever id is expected, however cut; one changed bit never does. */
/* SPDX-License-Identifier: BSD-3-Clause */
#include "fuzz/fuzz.h"
#include "wire/wire.h"

#define MAX_PACKET 8192u

/* Input: flags, source, destination, sport, dport, id, expected id, bit to flip, two cuts, packet with ICRC. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};
	uint8_t buf[MAX_PACKET] = {0}, flags = fuzz_u8(&in);
	uint16_t expected, found = 0;
	struct mg_flow f = {.df = flags & 1};
	struct iovec iov[3];
	uint32_t crc, flip;
	size_t a, b, len;
	bool v4;

	if (flags & 2) {
		memset(f.src + 10, 0xff, 2);
		memset(f.dst + 10, 0xff, 2);
		fuzz_take(&in, f.src + 12, 4);
		fuzz_take(&in, f.dst + 12, 4);
	} else {
		fuzz_take(&in, f.src, 16);
		fuzz_take(&in, f.dst, 16);
	}
	v4 = mg_gid_is_v4(f.dst);
	f.sport = fuzz_u16(&in);
	f.dport = fuzz_u16(&in);
	f.ip_id = fuzz_u16(&in);
	expected = fuzz_u16(&in);
	flip = fuzz_u16(&in);
	a = fuzz_u16(&in);
	b = fuzz_u16(&in);
	len = in.left < MAX_PACKET ? in.left : MAX_PACKET;
	if (len)
		memcpy(buf, in.p, len);

	/* As it came: a check that succeeds has found the id the ICRC was made with. */
	if (mg_icrc_check(&f, buf, len, &found)) {
		struct mg_flow g = f;

		g.ip_id = found;
		iov[0] = (struct iovec){buf, len - MG_ICRC_LEN};
		crc = mg_icrc(&g, iov, 1, len - MG_ICRC_LEN);
		FUZZ_CHECK(memcmp(&crc, buf + len - MG_ICRC_LEN, 4) == 0);
		FUZZ_CHECK(v4 || found == f.ip_id);
	}
	if (len < MG_BTH_LEN + MG_ICRC_LEN)
		return 0;

	/* Sealed by us. */
	len -= MG_ICRC_LEN;
	a = MG_BTH_LEN + a % (len - MG_BTH_LEN + 1);
	b = a + b % (len - a + 1);
	iov[0] = (struct iovec){buf, a};
	iov[1] = (struct iovec){buf + a, b - a};
	iov[2] = (struct iovec){buf + b, len - b};
	crc = mg_icrc(&f, iov, 3, len);
	iov[0].iov_len = len;
	FUZZ_CHECK(crc == mg_icrc(&f, iov, 1, len));
	memcpy(buf + len, &crc, sizeof(crc));
	len += MG_ICRC_LEN;
	FUZZ_CHECK(mg_icrc_check(&f, buf, len, &found) && found == f.ip_id);
	if (v4) {
		struct mg_flow g = f;

		g.ip_id = expected;
		FUZZ_CHECK(mg_icrc_check(&g, buf, len, &found) && found == f.ip_id);
	}

	flip %= 8 * (uint32_t)len;
	buf[flip >> 3] ^= (uint8_t)(1u << (flip & 7));
	found = expected;
	FUZZ_CHECK(mg_icrc_check(&f, buf, len, &found) == (flip >> 3 == 4));
	FUZZ_CHECK(found == (flip >> 3 == 4 ? f.ip_id : expected));
	return 0;
}
