/* The C interface of the runner: libkiln.so, which exports these functions and nothing else. C99 and newer; C++ too.
 *
 * Results. Each function that can fail returns a kiln_status. Where it is not KILN_OK, kiln_error() has one line that says what, where and
 * what to do, and nothing was written through the pointers that were given, unless said otherwise below.
 *
 * Handles. A kiln_model, a kiln_session and a kiln_snapshot are names, not addresses: a NULL, freed, foreign or made-up one is KILN_MISUSED,
 * never a crash. A session and a snapshot keep their model alive; they may be freed in any order, and while a call is using them: the handle
 * is gone at once, the memory when the last call and the last session end.
 *
 * Threads. Every function may be called from any thread. A model is immutable: any number of threads may use it and open sessions over it.
 * A session is one call's at a time: a second one meanwhile, from another thread or from its own callback, is KILN_FAILED and changes
 * nothing; kiln_position() and kiln_session_free() are allowed at any time. kiln_error() is the calling thread's own.
 *
 * Callbacks run on the thread of the call and must return: no longjmp, no C++ exception. Text is UTF-8; lengths are in bytes.
 */
#ifndef KILN_H
#define KILN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kiln_model kiln_model;
typedef struct kiln_session kiln_session;
typedef struct kiln_snapshot kiln_snapshot;

typedef enum kiln_status {
  KILN_OK = 0,
  KILN_FAILED = 1, /* the call was right, and could not be done */
  KILN_MISUSED = 2 /* a handle that is none, NULL where a value must be, a value out of its range */
} kiln_status;

/* "0.1.0 (artifact format 2)". Never NULL, never freed. */
const char* kiln_version(void);

/* Why the last call that failed on this thread did; "" before the first. Valid until the next call that fails on this thread. */
const char* kiln_error(void);

/* Threads of the CPU kernels, for the whole process; 0: one for each core. */
kiln_status kiln_set_threads(int threads);

/* ---- models ---- */

/* A structure that may grow: `size` is its sizeof as the caller was compiled, fields left at zero take their defaults. */
typedef struct kiln_load_options {
  size_t size;
  const char* device; /* "cpu", "cuda", "cuda:1"; NULL: a GPU where there is one and the artifact has a target for one, else the CPU */
  int verify;         /* not 0: recompute every SHA-256 before anything is used */
  int verify_threads; /* 0: one */
  void (*progress)(uint64_t done, uint64_t total, void* user); /* bytes of weights on the device; may be NULL */
  void* user;
  const char* weights; /* the GGUF file of the weights, where the artifact holds code only; else NULL */
  const char* ple;     /* "device" or "host", where a GPU finds a per-layer embedding's table; NULL: as the artifact says */
  void (*note)(const char* line, void* user); /* of what a user should know of a GGUF file that is otherwise in order; may be NULL */
} kiln_load_options;

/* Opens the artifact in the folder `path`. `options` may be NULL. */
kiln_status kiln_model_load(const char* path, const kiln_load_options* options, kiln_model** model);
kiln_status kiln_model_free(kiln_model* model);

typedef struct kiln_model_info {
  size_t size; /* set by the caller, as above */
  int64_t vocab_size;
  int64_t max_seq_len;   /* tokens that a session holds */
  int64_t prefill_chunk; /* tokens of one piece of a prompt */
  int has_tokenizer;
  char device[32]; /* "cpu", "cuda:0" */
  char target[32]; /* "cpu", "sm_90" */
} kiln_model_info;

kiln_status kiln_model_describe(const kiln_model* model, kiln_model_info* info);

/* ---- text ---- */

typedef enum kiln_encoding {
  KILN_CHAT = 0,  /* one user turn in the model's chat template, where it has one, else as KILN_TEXT */
  KILN_TEXT = 1,  /* BOS, and the text with nothing special in it */
  KILN_PIECE = 2, /* the same without BOS */
  KILN_MARKUP = 3 /* BOS, and the text with special tokens recognized: never for what a user wrote */
} kiln_encoding;

/* Token ids of `bytes` bytes of text; how: a kiln_encoding. *count is their number, also where `capacity` is too small for them, which is
 * KILN_FAILED; with `ids` NULL and `capacity` 0 they are only counted. */
kiln_status kiln_encode(const kiln_model* model, const char* text, size_t bytes, int how, int64_t* ids, size_t capacity, size_t* count);

/* Text of ids, and a NUL behind it that *bytes does not count; bytes that are no UTF-8 become U+FFFD, control tokens nothing. Sizes as above:
 * with `text` NULL and `capacity` 0 only *bytes is set, and capacity must be more than it. */
kiln_status kiln_decode(const kiln_model* model, const int64_t* ids, size_t count, char* text, size_t capacity, size_t* bytes);

/* *yes: whether the token ends a generation. */
kiln_status kiln_is_eog(const kiln_model* model, int64_t token, int* yes);

/* ---- sessions: one sequence over a model each, with caches of its own ---- */

typedef struct kiln_session_options {
  size_t size;
  int64_t prefill_chunk; /* 0: the artifact's; less takes less memory */
  int no_graph;          /* GPU: queue each step's kernels instead of replaying them as one CUDA graph */
  int no_early_launch;   /* GPU: kernels of that graph do not start before their predecessor has ended */
} kiln_session_options;

kiln_status kiln_session_open(const kiln_model* model, const kiln_session_options* options, kiln_session** session);
kiln_status kiln_session_free(kiln_session* session);

/* temperature 0: the likeliest token. top_k 0 and top_p 1: off. Each token's choice depends on seed, position and logits alone. */
kiln_status kiln_set_sampling(kiln_session* session, float temperature, int32_t top_k, float top_p, int64_t seed);

/* Appends `count` tokens; *next is the token sampled after them. */
kiln_status kiln_prefill(kiln_session* session, const int64_t* ids, size_t count, int64_t* next);

#define KILN_SAMPLED (-1) /* the token that was sampled last */

/* Appends one token, or KILN_SAMPLED; *next is the one sampled after it. */
kiln_status kiln_step(kiln_session* session, int64_t token, int64_t* next);

typedef enum kiln_stop { KILN_STOP_EOG = 0, KILN_STOP_LENGTH = 1, KILN_STOP_MAX_SEQ_LEN = 2, KILN_STOP_CALLBACK = 3 } kiln_stop;

/* Gets each token and the text that is complete with it, possibly none (a character may take several tokens); `text` ends with NUL, and lives
 * until it returns. What is left over at the end comes with token -1, whatever it returned. Not 0: stop. */
typedef int (*kiln_on_token)(int64_t token, const char* text, size_t bytes, void* user);

/* Hands out the sampled token and up to max_new_tokens - 1 further ones, until one ends the generation (it is not handed out; past_eog not 0:
 * go on and hand it out), the session is full or the callback stops it. Without a tokenizer the text is empty. *stop may be NULL. */
kiln_status kiln_generate(kiln_session* session, int64_t max_new_tokens, int past_eog, kiln_on_token on_token, void* user, kiln_stop* stop);

#define KILN_DRAFT_OFF 0
#define KILN_DRAFT_NGRAM 1 /* what followed where the end of the text occurred before */
#define KILN_DRAFT_MTP 2   /* by the model that was exported with this one to draft for it */

/* Of every kiln_generate() of the session from here on: tokens are drafted, and one step checks several. No token of a text becomes another by that,
 * and it is left where it does not pay. source: one of the above; length: most drafts of a step, 0: as many as fit. KILN_FAILED where the artifact has no
 * steps of several tokens, or none that takes so many, or no drafter. */
kiln_status kiln_set_drafts(kiln_session* session, int source, int64_t length);

typedef struct kiln_draft_counts {
  size_t size;   /* set by the caller */
  int64_t steps; /* of the last kiln_generate() with drafts, those of one token too */
  int64_t tokens;          /* that they gave */
  int64_t tried, right;    /* drafts; what came behind a wrong one was not tried */
} kiln_draft_counts;

kiln_status kiln_count_drafts(const kiln_session* session, kiln_draft_counts* counts);

/* Logits of the last position: `capacity` must be at least the model's vocab_size. */
kiln_status kiln_logits(kiln_session* session, float* logits, size_t capacity);

/* *position: tokens in the caches. */
kiln_status kiln_position(const kiln_session* session, int64_t* position);

/* Empties the caches. */
kiln_status kiln_reset(kiln_session* session);

/* The tokens in the caches; sizes as for kiln_encode. */
kiln_status kiln_tokens(const kiln_session* session, int64_t* ids, size_t capacity, size_t* count);

/* ---- going back, and going on elsewhere ---- */

/* Forgets the tokens from `position` on: 0, or *earliest .. the session's position. Elsewhere the caches have lost what a token there needs, which is
 * KILN_FAILED. The next token must be given. */
kiln_status kiln_rewind(kiln_session* session, int64_t position);
kiln_status kiln_earliest(const kiln_session* session, int64_t* earliest);

#define KILN_WHOLE 1 /* any session of the model can go on from it, whatever becomes of the one that it was taken from */
#define KILN_HOST 2  /* its copies lie in memory of the host, also where the session is a GPU's */

/* The session as it stands; flags: 0, or a sum of those above. Immutable; any thread may use it. Without KILN_WHOLE it has copies of what a session
 * forgets on its way, and shares the rest with the session. What goes on from it equals, bit for bit, what would have gone on then. */
kiln_status kiln_snapshot_take(const kiln_session* session, int flags, kiln_snapshot** snapshot);
kiln_status kiln_snapshot_free(kiln_snapshot* snapshot);

typedef struct kiln_snapshot_info {
  size_t size; /* set by the caller */
  int64_t position;
  uint64_t device_bytes; /* of a GPU's memory */
  uint64_t host_bytes;
  int whole;
} kiln_snapshot_info;

kiln_status kiln_snapshot_describe(const kiln_snapshot* snapshot, kiln_snapshot_info* info);

/* Goes on from a snapshot. KILN_FAILED, and nothing changes, where what it shares has been overwritten. */
kiln_status kiln_restore(kiln_session* session, const kiln_snapshot* snapshot);

/* The same by a file, which appears whole or not at all, and is refused where a byte, the artifact, its weights or the target differ. */
kiln_status kiln_session_save(const kiln_session* session, const char* path);
kiln_status kiln_session_load(kiln_session* session, const char* path);

#ifdef __cplusplus
}
#endif
#endif
