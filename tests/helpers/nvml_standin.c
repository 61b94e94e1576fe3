/* A stand-in for libnvidia-ml.so.1, for tests. It drives no GPU: it answers from a scenario file, read anew at each call.
 *
 * The file is named by $NVML_STANDIN_SCENARIO, else by the macro SCENARIO. Write it by rename. One statement a line:
 *   driver VERSION
 *   device INDEX key=value ...    uuid name minor total used (MiB) sm mem (percent) power limit min max (mW) energy (mJ)
 *                                 rate (mJ a second since the file was written) pcie (KB/s) mig
 *   slice DEVICE NUMBER key=value ...                                uuid gi ci slices (of 7) total used
 *   process DEVICE PID key=value ...                                 mib (-1: not available) sm mem gi ci type=C|G|M
 *   fail FUNCTION CODE            that function answers CODE           hang FUNCTION MS        it sleeps first
 * What would change a device is appended to SCENARIO.log instead.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef SCENARIO
#define SCENARIO "/nonexistent"
#endif
enum { OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, SIZE = 7, VERSION = 25 };
enum { DEVICES = 8, SLICES = 8, PROCESSES = 64, NONE = -1 };

typedef struct { uint64_t total, free, used; } Memory;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } MemoryV2;
typedef struct { uint32_t gpu, memory; } Rates;
typedef struct { uint32_t pid; uint64_t used; uint32_t gi, ci; } ProcessInfo;
typedef struct { uint32_t pid; uint64_t time; uint32_t sm, mem, enc, dec; } UtilizationSample;
typedef struct { uint32_t sms, ce, dec, enc, jpeg, ofa, gis, cis; uint64_t mib; } Attributes;
typedef struct { char legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { const char *space; uint64_t soft, hard; } SetLimits;
typedef struct { const char *space; uint64_t soft, hard, used; } GetLimits;
_Static_assert(sizeof(Memory) == 24 && sizeof(MemoryV2) == 40 && sizeof(Rates) == 8, "memory, rates");
_Static_assert(sizeof(ProcessInfo) == 24 && sizeof(UtilizationSample) == 32, "processes");
_Static_assert(sizeof(Attributes) == 40 && sizeof(Pci) == 68, "attributes, pci");
_Static_assert(sizeof(SetLimits) == 24 && sizeof(GetLimits) == 32, "memory limits");

typedef struct { /* a device, or a slice of one */
    int there, minor, slices, mig, gi, ci;
    char uuid[96], name[96];
    uint64_t total, used, sm, mem, power, limit, min, max, energy, rate, pcie;
} Unit;
typedef struct { int device; uint32_t pid; int64_t mib; uint32_t sm, mem; int gi, ci; char type; } Process;
typedef struct {
    Unit device[DEVICES], slice[DEVICES][SLICES];
    Process process[PROCESSES];
    int processes;
    double age;
    char driver[32];
} World;
typedef struct Handle { int device, slice; } Handle;
static Handle handles[DEVICES][SLICES + 1];
static int initialised;

static const char *scenario(void) {
    const char *named = getenv("NVML_STANDIN_SCENARIO");
    return named && *named ? named : SCENARIO;
}

static void set(Unit *u, const char *key, const char *value) {
    uint64_t number = strtoull(value, NULL, 10);
    if (!strcmp(key, "uuid")) snprintf(u->uuid, sizeof u->uuid, "%s", value);
    else if (!strcmp(key, "name")) snprintf(u->name, sizeof u->name, "%s", value);
    else if (!strcmp(key, "minor")) u->minor = number;
    else if (!strcmp(key, "slices")) u->slices = number;
    else if (!strcmp(key, "mig")) u->mig = number;
    else if (!strcmp(key, "gi")) u->gi = number;
    else if (!strcmp(key, "ci")) u->ci = number;
    else if (!strcmp(key, "total")) u->total = number << 20;
    else if (!strcmp(key, "used")) u->used = number << 20;
    else if (!strcmp(key, "sm")) u->sm = number;
    else if (!strcmp(key, "mem")) u->mem = number;
    else if (!strcmp(key, "power")) u->power = number;
    else if (!strcmp(key, "limit")) u->limit = number;
    else if (!strcmp(key, "min")) u->min = number;
    else if (!strcmp(key, "max")) u->max = number;
    else if (!strcmp(key, "energy")) u->energy = number;
    else if (!strcmp(key, "rate")) u->rate = number;
    else if (!strcmp(key, "pcie")) u->pcie = number;
}

static void set_process(Process *p, const char *key, const char *value) {
    if (!strcmp(key, "mib")) p->mib = strtoll(value, NULL, 10);
    else if (!strcmp(key, "sm")) p->sm = atoi(value);
    else if (!strcmp(key, "mem")) p->mem = atoi(value);
    else if (!strcmp(key, "gi")) p->gi = atoi(value);
    else if (!strcmp(key, "ci")) p->ci = atoi(value);
    else if (!strcmp(key, "type")) p->type = *value;
}

/* Reads the scenario into w; the code that `function` is told to fail with, else OK. */
static int look(const char *function, World *w) {
    char line[1024], *words[32], *state;
    int answer = OK, hang = 0;
    struct stat info;
    struct timespec now;
    memset(w, 0, sizeof *w);
    snprintf(w->driver, sizeof w->driver, "575.57.08");
    FILE *file = fopen(scenario(), "re");
    if (!file) return initialised || !strncmp(function, "nvmlInit", 8) ? 9 /* DRIVER_NOT_LOADED */ : UNINITIALIZED;
    fstat(fileno(file), &info);
    clock_gettime(CLOCK_REALTIME, &now);
    w->age = now.tv_sec - info.st_mtim.tv_sec + (now.tv_nsec - info.st_mtim.tv_nsec) / 1e9;
    while (fgets(line, sizeof line, file)) {
        int n = 0, i = 2;
        for (char *word = strtok_r(line, " \n", &state); word && n < 32; word = strtok_r(NULL, " \n", &state))
            words[n++] = word;
        if (n < 2 || words[0][0] == '#') continue;
        int first = atoi(words[1]), second = n > 2 ? atoi(words[2]) : 0;
        Unit *u = NULL;
        Process *p = NULL;
        if (!strcmp(words[0], "driver")) snprintf(w->driver, sizeof w->driver, "%s", words[1]);
        else if (!strcmp(words[0], "fail") && n > 2 && !strcmp(words[1], function)) answer = second;
        else if (!strcmp(words[0], "hang") && n > 2 && !strcmp(words[1], function)) hang = second;
        else if (!strcmp(words[0], "device") && first < DEVICES) {
            u = &w->device[first];
            *u = (Unit){.there = 1, .minor = first, .gi = NONE, .ci = NONE};
        } else if (!strcmp(words[0], "slice") && first < DEVICES && second < SLICES) {
            u = &w->slice[first][second];
            *u = (Unit){.there = 1, .slices = 1, .gi = second + 1, .ci = 0};
            i = 3;
        } else if (!strcmp(words[0], "process") && w->processes < PROCESSES) {
            p = &w->process[w->processes++];
            *p = (Process){.device = first, .pid = strtoul(words[2], NULL, 10), .gi = NONE, .ci = NONE, .type = 'C'};
            i = 3;
        }
        for (; i < n; i++) {
            char *value = strchr(words[i], '=');
            if (!value) continue;
            *value++ = 0;
            if (u) set(u, words[i], value);
            if (p) set_process(p, words[i], value);
        }
    }
    fclose(file);
    if (hang) usleep(hang * 1000);
    if (answer == OK && !initialised && strncmp(function, "nvmlInit", 8)) return UNINITIALIZED;
    return answer;
}

static void note(const char *format, int device, unsigned long long value, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s.log", scenario());
    FILE *file = fopen(path, "ae");
    if (!file) return;
    fprintf(file, format, device, value, text);
    fclose(file);
}

#define ENTER World world, *w = &world; int code = look(__func__, w); if (code) return code
#define UNIT Unit *u = unit(w, h); if (!u) return 28 /* GPU_NOT_FOUND */
#define GET(name, type, value) int name(Handle *h, type *out) { ENTER; UNIT; *out = (value); return OK; }
#define WHOLE if (h->slice >= 0) return NOT_SUPPORTED

static Unit *unit(World *w, Handle *h) {
    Unit *u = h->slice < 0 ? &w->device[h->device] : &w->slice[h->device][h->slice];
    return u->there ? u : NULL;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER;
    for (int d = 0; d < DEVICES; d++)
        for (int s = -1; s < SLICES; s++) handles[d][s + 1] = (Handle){d, s};
    initialised = 1;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { initialised = 0; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "as the stand-in's scenario says"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { ENTER; snprintf(out, size, "%s", w->driver); return OK; }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { ENTER; snprintf(out, size, "stand-in"); return OK; }

int nvmlDeviceGetCount_v2(unsigned *out) {
    ENTER;
    for (*out = 0; *out < DEVICES && w->device[*out].there; ++*out) {}
    return OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle **out) {
    ENTER;
    if (index >= DEVICES || !w->device[index].there) return INVALID;
    *out = &handles[index][0];
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Handle **out) {
    ENTER;
    for (int d = 0; d < DEVICES; d++)
        for (int s = -1; s < SLICES; s++) {
            Unit *u = unit(w, &handles[d][s + 1]);
            if (u && !strcmp(u->uuid, uuid)) { *out = &handles[d][s + 1]; return OK; }
        }
    return NOT_FOUND;
}
int nvmlDeviceGetMigMode(Handle *h, unsigned *now, unsigned *pending) {
    ENTER; UNIT; WHOLE;
    *now = *pending = u->mig;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Handle *h, unsigned *out) { ENTER; UNIT; *out = u->mig ? 7 : 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(Handle *h, unsigned index, Handle **out) {
    ENTER; UNIT;
    if (index >= SLICES || !w->slice[h->device][index].there) return NOT_FOUND;
    *out = &handles[h->device][index + 1];
    return OK;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle *h, Handle **out) {
    ENTER;
    *out = &handles[h->device][0];
    return OK;
}
int nvmlDeviceGetUUID(Handle *h, char *out, unsigned size) { ENTER; UNIT; snprintf(out, size, "%s", u->uuid); return OK; }
int nvmlDeviceGetName(Handle *h, char *out, unsigned size) {
    ENTER; UNIT;
    snprintf(out, size, "%s", u->name[0] ? u->name : "Stand-in GPU");
    return OK;
}
GET(nvmlDeviceGetIndex, unsigned, h->device)
GET(nvmlDeviceGetMinorNumber, unsigned, u->minor)
GET(nvmlDeviceGetGpuInstanceId, unsigned, u->gi)
GET(nvmlDeviceGetComputeInstanceId, unsigned, u->ci)
GET(nvmlDeviceGetPowerUsage, unsigned, u->power)
GET(nvmlDeviceGetPowerManagementLimit, unsigned, u->limit)
int nvmlDeviceGetPowerManagementLimitConstraints(Handle *h, unsigned *low, unsigned *high) {
    ENTER; UNIT; WHOLE;
    if (!u->max) return NOT_SUPPORTED;
    *low = u->min, *high = u->max;
    return OK;
}
int nvmlDeviceSetPowerManagementLimit(Handle *h, unsigned mw) {
    ENTER; UNIT; WHOLE;
    if (mw < u->min || mw > u->max) return INVALID;
    note("power %d %llu%s\n", h->device, mw, "");
    return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(Handle *h, unsigned long long *out) {
    ENTER; UNIT; WHOLE;
    *out = u->energy + (uint64_t)(u->rate * w->age);
    return OK;
}
int nvmlDeviceGetMemoryInfo(Handle *h, Memory *out) {
    ENTER; UNIT;
    *out = (Memory){u->total, u->total - u->used, u->used};
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(Handle *h, MemoryV2 *out) {
    ENTER; UNIT;
    if (out->version != (sizeof *out | 2u << 24)) return VERSION;
    *out = (MemoryV2){out->version, u->total, 0, u->total - u->used, u->used};
    return OK;
}
int nvmlDeviceGetUtilizationRates(Handle *h, Rates *out) {
    ENTER; UNIT; WHOLE;
    if (u->mig) return NOT_SUPPORTED;
    *out = (Rates){u->sm, u->mem};
    return OK;
}
int nvmlDeviceGetPcieThroughput(Handle *h, unsigned counter, unsigned *out) {
    ENTER; UNIT; WHOLE;
    (void)counter;
    *out = u->pcie;
    return OK;
}
int nvmlDeviceGetAttributes_v2(Handle *h, Attributes *out) {
    ENTER; UNIT;
    if (h->slice < 0) return NOT_SUPPORTED;
    *out = (Attributes){.gis = u->slices, .cis = u->slices, .mib = u->total >> 20};
    return OK;
}
int nvmlDeviceGetPciInfo_v3(Handle *h, Pci *out) {
    ENTER; UNIT;
    *out = (Pci){.bus = h->device + 1};
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", h->device + 1);
    return OK;
}

static int processes(World *w, Handle *h, char type, unsigned *count, ProcessInfo *out) {
    unsigned found = 0, room = out ? *count : 0;
    for (int i = 0; i < w->processes; i++) {
        Process *p = &w->process[i];
        if (p->device != h->device || p->type != type) continue;
        if (h->slice >= 0 && p->gi != w->slice[h->device][h->slice].gi) continue;
        if (found < room)
            out[found] = (ProcessInfo){p->pid, p->mib < 0 ? UINT64_MAX : (uint64_t)p->mib << 20, p->gi, p->ci};
        found++;
    }
    *count = found;
    return found > room ? SIZE : OK;
}
#define LIST(name, type) \
    int name(Handle *h, unsigned *count, ProcessInfo *out) { ENTER; UNIT; return processes(w, h, type, count, out); }
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 'C')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 'G')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'M')

int nvmlDeviceGetProcessUtilization(Handle *h, UtilizationSample *out, unsigned *count, unsigned long long since) {
    ENTER; UNIT; WHOLE;
    if (u->mig) return NOT_SUPPORTED;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t time_us = now.tv_sec * 1000000ull + now.tv_nsec / 1000;
    unsigned found = 0, room = out ? *count : 0;
    for (int i = 0; i < w->processes; i++) {
        Process *p = &w->process[i];
        if (p->device != h->device || time_us <= since) continue;
        if (found < room) out[found] = (UtilizationSample){p->pid, time_us, p->sm, p->mem, 0, 0};
        found++;
    }
    *count = found;
    return !found ? NOT_FOUND : found > room ? SIZE : OK;
}
int nvmlDeviceSetMemoryLimits_v1(Handle *h, SetLimits *limits) {
    ENTER; UNIT; WHOLE;
    if (atoi(w->driver) < 615) return 13; /* FUNCTION_NOT_FOUND */
    note("memory %d %llu %s\n", h->device, limits->hard, limits->space);
    return OK;
}
int nvmlDeviceGetMemoryLimits_v1(Handle *h, GetLimits *limits) {
    ENTER; UNIT; WHOLE;
    if (atoi(w->driver) < 615) return 13;
    limits->soft = limits->hard = UINT64_MAX, limits->used = u->used;
    return OK;
}
