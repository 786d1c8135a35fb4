/* Plays an artifact through the C interface:
 *   K=$(python -c 'import kiln; print(kiln.__path__[0])')
 *   cc -std=c99 play.c -I"$K/include" -L"$K/lib" -lkiln -Wl,-rpath,"$K/lib" -o play && ./play ARTIFACT "Why is the sky blue?" 100 */
#include <kiln.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(kiln_status status) {
  if (status == KILN_OK) return;
  fprintf(stderr, "play: error: %s\n", kiln_error());
  exit(1);
}

static int show(int64_t token, const char* text, size_t bytes, void* user) {
  int* tokens = user;
  *tokens += token >= 0; /* -1: only what was left over of the text */
  return fwrite(text, 1, bytes, stdout) != bytes || fflush(stdout);
}

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: play ARTIFACT PROMPT TOKENS\n");
    return 2;
  }
  const char* prompt = arguments[2];

  kiln_model* model;
  kiln_load_options options = {.size = sizeof(options), .device = "cpu"};
  check(kiln_model_load(arguments[1], &options, &model));
  kiln_model_info info = {.size = sizeof(info)};
  check(kiln_model_describe(model, &info));

  size_t length, room;
  check(kiln_encode(model, prompt, strlen(prompt), KILN_CHAT, NULL, 0, &length));
  int64_t* ids = malloc(length * sizeof(*ids));
  if (!ids) return 1;
  check(kiln_encode(model, prompt, strlen(prompt), KILN_CHAT, ids, length, &length));

  kiln_session* session;
  check(kiln_session_open(model, NULL, &session));
  int64_t next, position;
  check(kiln_prefill(session, ids, length, &next));

  int tokens = 0;
  kiln_stop stop;
  check(kiln_generate(session, atoi(arguments[3]), 0, show, &tokens, &stop));
  check(kiln_position(session, &position));
  fprintf(stderr, "\n%d tokens after %zu, position %lld of %lld, on %s, stopped by reason %d; kiln %s\n", tokens, length, (long long)position,
          (long long)info.max_seq_len, info.device, (int)stop, kiln_version());

  check(kiln_decode(model, ids, length, NULL, 0, &room));
  char* again = malloc(room + 1);
  if (!again) return 1;
  check(kiln_decode(model, ids, length, again, room + 1, &room));
  fprintf(stderr, "the prompt was: %s\n", again);
  free(again);
  free(ids);
  check(kiln_session_free(session));
  check(kiln_model_free(model));
  return 0;
}
