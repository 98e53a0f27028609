/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * trace.c - what happens in a world, as text: one line each, time in us first.
 */
#include "sim/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define LINE_MAX_LEN 400

static void put(struct mgs_world *w, const char *fmt, va_list ap)
{
	int n;

	w->trace = sim_grow(w->trace, w->trace_len + LINE_MAX_LEN + 40, &w->trace_cap, 1);
	n = snprintf(w->trace + w->trace_len, 40, "%12.3f ", (double)w->now / 1000);
	w->trace_len += (size_t)n;
	n = vsnprintf(w->trace + w->trace_len, LINE_MAX_LEN, fmt, ap);
	if (n >= LINE_MAX_LEN)
		n = LINE_MAX_LEN - 1;
	w->trace_len += (size_t)n;
	w->trace[w->trace_len++] = '\n';
}

void sim_trace(struct mgs_world *w, const char *fmt, ...)
{
	va_list ap;

	if (!w->tracing)
		return;
	va_start(ap, fmt);
	put(w, fmt, ap);
	va_end(ap);
}

static int describe(const struct sim_packet *p, char *out, size_t cap)
{
	struct mg_hdrs h;
	int n;

	if (mg_hdrs_parse(p->data, p->len, &h))
		return snprintf(out, cap, "unparsable, %u bytes", p->len);
	n = snprintf(out, cap, "%-18s qp %06x psn %06x len %u%s%s%s", mg_opinfo[h.opcode].name, h.dest_qpn,
		     h.psn, h.payload_len, h.ackreq ? " A" : "", h.solicited ? " SE" : "",
		     h.capable ? " cap" : "");
	if (h.mask & MG_H_RETH)
		n += snprintf(out + n, cap - (size_t)n, " va %" PRIx64 " rkey %x dmalen %u", h.reth.va,
			      h.reth.rkey, h.reth.length);
	if (h.mask & MG_H_AETH)
		n += snprintf(out + n, cap - (size_t)n, " syn %02x msn %u", h.aeth.syndrome, h.aeth.msn);
	if (h.mask & MG_H_IMM)
		n += snprintf(out + n, cap - (size_t)n, " imm %x", h.imm);
	if (h.mask & MG_H_MEH)
		n += snprintf(out + n, cap - (size_t)n, " src_qp %06x epoch %u psn %06x token %02x%02x..",
			      h.meh.src_qpn, h.meh.epoch, h.meh.psn, h.meh.token[0], h.meh.token[1]);
	return n;
}

void sim_trace_packet(struct mgs_world *w, const char *what, const struct sim_packet *p, int to)
{
	char text[LINE_MAX_LEN - 80];

	if (!w->tracing)
		return;
	describe(p, text, sizeof(text));
	sim_trace(w, "%-8s e%d>%d #%" PRIu64 " %s", what, p->from, to, p->seq, text);
}

void mgs_trace(struct mgs_world *w, int on)
{
	w->tracing = on != 0;
}

size_t mgs_trace_text(struct mgs_world *w, const char **text)
{
	const size_t n = w->trace_len;

	free(w->trace_out);
	w->trace_out = w->trace;
	w->trace = NULL;
	w->trace_len = w->trace_cap = 0;
	*text = w->trace_out;
	return n;
}
