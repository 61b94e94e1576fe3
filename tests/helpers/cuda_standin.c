/* A stand-in for libcuda.so.1, for trying bench/gpu.py where there is no GPU. It computes nothing and touches no device:
 * it answers the calls that bench/gpu_program.py makes, as a driver with one device would. */

#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define NO_DEVICE 100

int cuInit(unsigned flags) { (void)flags; return access("/dev/nvidiactl", F_OK) ? NO_DEVICE : 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxCreate_v2(void **context, unsigned flags, int device) { (void)flags; (void)device; *context = 0; return 0; }
/* The name is how whoever writes the scenario sees that memory is taken now. */
int cuMemAlloc_v2(uint64_t *pointer, size_t size) { *pointer = size; return prctl(PR_SET_NAME, "has-gpu-memory"); }
int cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t size) {
    (void)pointer; (void)value; (void)size; return 0;
}
int cuModuleLoadData(void **module, const void *image) { *module = 0; return strstr(image, ".entry spin") ? 0 : 1; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module; *function = 0; return strcmp(name, "spin") ? 1 : 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute; return 0; }
int cuCtxSynchronize(void) { usleep(20000); return 0; }

int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    strncpy(name, "Stand-in", (size_t)length);
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **args, void **extra) {
    (void)function; (void)gx; (void)gy; (void)gz; (void)bx; (void)by; (void)bz; (void)shared; (void)stream; (void)extra;
    return args && *(uint64_t *)args[0] == 4 && *(uint32_t *)args[1] ? 0 : 1;
}
