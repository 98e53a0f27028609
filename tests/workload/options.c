/* SPDX-License-Identifier: BSD-3-Clause */
#include "mgcheck.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] =
	"usage: mgcheck [OPTIONS]            the server: takes its terms from the client\n"
	"       mgcheck [OPTIONS] SERVER     the client\n"
	"\n"
	"Sends numbered, CRC'd messages between two processes by RDMA and verifies every one of them:\n"
	"once only, in order, byte for byte, completions in posting order. Prints a verdict (JSON, one\n"
	"line). Exit status: 0 all is right, 1 something was wrong, 2 the test could not be made.\n"
	"\n"
	"The client decides for both:\n"
	"  --qps N             QPs (4)\n"
	"  --ops LIST          of send,send_imm,write,write_imm,read,atomic (all)\n"
	"  --one-way           client to server only     --reverse  server to client only\n"
	"  --messages N        per QP and direction      --seconds S  (default: --seconds 5)\n"
	"  --max-size N        bytes (262144)            --size N     all of this size\n"
	"  --seed N            of the plan of messages (1)\n"
	"  --rnr-every N       after so many received messages of a QP post no receives for a while\n"
	"                      (400; 0: never)           --rnr-ms MS  for so long (3)\n"
	"  --psn N             first PSN (random)        --mtu N      path MTU (the port's)\n"
	"  --no-tcp-after-setup  close the control connection once the QPs are connected\n"
	"\n"
	"Each side decides:\n"
	"  -d, --device NAME   (the first)   -x, --gid-index N   (the first RoCE v2 IPv4 one)\n"
	"  -i, --ib-port N     (1)           -p, --port N        TCP port (18515)\n"
	"  --events            sleep for completion events instead of polling\n"
	"  --new-api           ibv_wr_* instead of ibv_post_send\n"
	"  --cq MODE           shared (one for all), split (one for sends, one for receives), per-qp\n"
	"  --depth N           send queue (64)           --recv-depth N  (32)\n"
	"  --sges N            at most so many pieces a message is sent from (4; rdma-core's rxe adds them "
	"up\n"
	"                      wrongly in ibv_wr_set_sge_list)\n"
	"  --inline N          largest inline message (220)\n"
	"  --no-fence          no IBV_SEND_FENCE (the kernel's rdma_rxe, 6.12, can lose its wake-up on it)\n"
	"  --rate N            messages/s of this side (no limit)\n"
	"  --corrupt-every N   spoil every Nth message sent: the other side must notice\n"
	"  --progress FILE     keep a line of counters (JSON) there, renewed every 50 ms\n"
	"  --idle-until FILE   once connected do nothing until FILE exists\n"
	"  --stall S           give up when nothing happens for so long (60)\n"
	"  --connect S         wait for the server to listen (20)\n"
	"  --linger MS         without a control connection: stay after the end (1000)\n";

enum {
	O_QPS = 256,
	O_OPS,
	O_ONE_WAY,
	O_REVERSE,
	O_MESSAGES,
	O_SECONDS,
	O_MAX_SIZE,
	O_SIZE,
	O_SEED,
	O_RNR_EVERY,
	O_RNR_MS,
	O_PSN,
	O_MTU,
	O_NO_TCP,
	O_EVENTS,
	O_NEW_API,
	O_CQ,
	O_DEPTH,
	O_RECV_DEPTH,
	O_SGES,
	O_INLINE,
	O_RATE,
	O_CORRUPT,
	O_NO_FENCE,
	O_PROGRESS,
	O_IDLE,
	O_STALL,
	O_CONNECT,
	O_LINGER
};

static const struct option longs[] = {
	{"qps", 1, NULL, O_QPS},
	{"ops", 1, NULL, O_OPS},
	{"one-way", 0, NULL, O_ONE_WAY},
	{"reverse", 0, NULL, O_REVERSE},
	{"messages", 1, NULL, O_MESSAGES},
	{"seconds", 1, NULL, O_SECONDS},
	{"max-size", 1, NULL, O_MAX_SIZE},
	{"size", 1, NULL, O_SIZE},
	{"seed", 1, NULL, O_SEED},
	{"rnr-every", 1, NULL, O_RNR_EVERY},
	{"rnr-ms", 1, NULL, O_RNR_MS},
	{"psn", 1, NULL, O_PSN},
	{"mtu", 1, NULL, O_MTU},
	{"no-tcp-after-setup", 0, NULL, O_NO_TCP},
	{"device", 1, NULL, 'd'},
	{"gid-index", 1, NULL, 'x'},
	{"ib-port", 1, NULL, 'i'},
	{"port", 1, NULL, 'p'},
	{"events", 0, NULL, O_EVENTS},
	{"new-api", 0, NULL, O_NEW_API},
	{"cq", 1, NULL, O_CQ},
	{"depth", 1, NULL, O_DEPTH},
	{"recv-depth", 1, NULL, O_RECV_DEPTH},
	{"sges", 1, NULL, O_SGES},
	{"inline", 1, NULL, O_INLINE},
	{"rate", 1, NULL, O_RATE},
	{"corrupt-every", 1, NULL, O_CORRUPT},
	{"no-fence", 0, NULL, O_NO_FENCE},
	{"progress", 1, NULL, O_PROGRESS},
	{"idle-until", 1, NULL, O_IDLE},
	{"stall", 1, NULL, O_STALL},
	{"connect", 1, NULL, O_CONNECT},
	{"linger", 1, NULL, O_LINGER},
	{"help", 0, NULL, 'h'},
	{NULL, 0, NULL, 0},
};

static uint64_t number(const char *what, const char *text, uint64_t min, uint64_t max)
{
	char *end;
	unsigned long long v = strtoull(text, &end, 0);

	if (*text < '0' || *text > '9' || *end || v < min || v > max)
		die("%s: %s is not a number from %llu to %llu", what, text, (unsigned long long)min,
		    (unsigned long long)max);
	return v;
}

static double real(const char *what, const char *text)
{
	char *end;
	double v = strtod(text, &end);

	if (end == text || *end || !(v >= 0) || v > 1e9)
		die("%s: %s is not a number", what, text);
	return v;
}

static uint32_t parse_ops(char *list)
{
	uint32_t ops = 0;

	for (char *save, *word = strtok_r(list, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
		unsigned k = 0;

		while (k < K_COUNT && strcmp(word, kind_name[k]))
			k++;
		if (k == K_COUNT)
			die("--ops: no such operation: %s", word);
		ops |= 1u << k;
	}
	if (!ops)
		die("--ops: empty");
	return ops;
}

void parse_options(int argc, char **argv, struct options *opt)
{
	struct terms *t = &opt->terms;
	bool seconds_given = false;
	int c;

	*opt = (struct options){
		.tcp_port = "18515",
		.gid_index = -1,
		.ib_port = 1,
		.depth = 64,
		.recv_depth = 32,
		.sges = MAX_SGE,
		.inline_max = 220,
		.stall_s = 60,
		.connect_s = 20,
		.linger_ms = 1000,
		.terms = {.qps = 4,
			  .directions = 3,
			  .rnr_every = 400,
			  .rnr_ms = 3,
			  .first_psn = UINT32_MAX,
			  .plan = {.seed = 1, .ops = OPS_ALL, .max_size = 262144, .fixed_size = UINT32_MAX}},
	};
	while ((c = getopt_long(argc, argv, "d:x:i:p:h", longs, NULL)) != -1) {
		switch (c) {
		case O_QPS: t->qps = number("--qps", optarg, 1, MAX_QPS); break;
		case O_OPS: t->plan.ops = parse_ops(optarg); break;
		case O_ONE_WAY: t->directions = 1; break;
		case O_REVERSE: t->directions = 2; break;
		case O_MESSAGES: t->messages = number("--messages", optarg, 1, UINT64_MAX / 2); break;
		case O_SECONDS:
			t->seconds_ms = (uint64_t)(real("--seconds", optarg) * 1000);
			seconds_given = true;
			break;
		case O_MAX_SIZE: t->plan.max_size = number("--max-size", optarg, 0, 1u << 24); break;
		case O_SIZE: t->plan.fixed_size = number("--size", optarg, 0, 1u << 24); break;
		case O_SEED: t->plan.seed = number("--seed", optarg, 0, UINT64_MAX); break;
		case O_RNR_EVERY: t->rnr_every = number("--rnr-every", optarg, 0, UINT32_MAX); break;
		case O_RNR_MS: t->rnr_ms = number("--rnr-ms", optarg, 0, 60000); break;
		case O_PSN: t->first_psn = number("--psn", optarg, 0, 0xffffff); break;
		case O_MTU: t->mtu = number("--mtu", optarg, 256, 4096); break;
		case O_NO_TCP: t->tcp_closes = 1; break;
		case 'd': opt->device = optarg; break;
		case 'x': opt->gid_index = (int)number("--gid-index", optarg, 0, 255); break;
		case 'i': opt->ib_port = (uint8_t)number("--ib-port", optarg, 1, 255); break;
		case 'p': opt->tcp_port = optarg; break;
		case O_EVENTS: opt->events = true; break;
		case O_NEW_API: opt->new_api = true; break;
		case O_CQ:
			if (!strcmp(optarg, "shared"))
				opt->cq_mode = CQ_SHARED;
			else if (!strcmp(optarg, "split"))
				opt->cq_mode = CQ_SPLIT;
			else if (!strcmp(optarg, "per-qp"))
				opt->cq_mode = CQ_PER_QP;
			else
				die("--cq: shared, split or per-qp, not %s", optarg);
			break;
		case O_DEPTH: opt->depth = number("--depth", optarg, 32, 16384); break;
		case O_RECV_DEPTH: opt->recv_depth = number("--recv-depth", optarg, 4, 16384); break;
		case O_SGES: opt->sges = number("--sges", optarg, 1, MAX_SGE); break;
		case O_INLINE: opt->inline_max = number("--inline", optarg, 0, 4096); break;
		case O_RATE: opt->rate = real("--rate", optarg); break;
		case O_CORRUPT: opt->corrupt_every = number("--corrupt-every", optarg, 1, UINT64_MAX); break;
		case O_NO_FENCE: opt->no_fence = true; break;
		case O_PROGRESS: opt->progress = optarg; break;
		case O_IDLE: opt->idle_until = optarg; break;
		case O_STALL: opt->stall_s = number("--stall", optarg, 1, 86400); break;
		case O_CONNECT: opt->connect_s = number("--connect", optarg, 0, 86400); break;
		case O_LINGER: opt->linger_ms = number("--linger", optarg, 0, 3600000); break;
		case 'h': fputs(help, stdout); exit(0);
		default: die("try --help");
		}
	}
	if (optind < argc)
		opt->server = argv[optind++];
	if (optind < argc)
		die("too many arguments: %s", argv[optind]);
	if (t->plan.fixed_size != UINT32_MAX)
		t->plan.max_size = t->plan.fixed_size;
	if (!t->messages && !seconds_given)
		t->seconds_ms = 5000;
	t->idle = opt->idle_until != NULL;
}
