// Package process is what kvnode and kvorch have in common as programs: reading
// their configuration, logging, and the shape of their command lines. Only it
// reads flags, files and the environment.
package process

import (
	"errors"
	"fmt"
	"math"
	"net"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/providers/posflag"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"
)

// field is one key of a configuration struct.
type field struct {
	key, help string
	value     reflect.Value
}

// fields lists the keys of a configuration, nested ones joined by dots. Keys come
// from the yaml tags of exported fields, help texts from the help tags.
func fields(v reflect.Value, prefix string) []field {
	var out []field
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case opts == "inline":
			out = append(out, fields(v.Field(i), prefix)...)
		case name == "" || name == "-":
		case f.Type.Kind() == reflect.Struct:
			out = append(out, fields(v.Field(i), prefix+name+".")...)
		default:
			out = append(out, field{prefix + name, f.Tag.Get("help"), v.Field(i)})
		}
	}
	return out
}

// addFlags adds a flag for every key whose value fits into one, with the present
// value of cfg as the default. Lists of tables are for files only.
func addFlags(fs *pflag.FlagSet, cfg any) {
	for _, f := range fields(reflect.ValueOf(cfg).Elem(), "") {
		switch v := f.value.Interface().(type) {
		case string:
			fs.String(f.key, v, f.help)
		case int:
			fs.Int(f.key, v, f.help)
		case int64:
			fs.Int64(f.key, v, f.help)
		case float64:
			fs.Float64(f.key, v, f.help)
		case time.Duration:
			fs.Duration(f.key, v, f.help)
		case []string:
			fs.StringSlice(f.key, v, f.help)
		}
	}
}

// ofKubernetes matches the ends of the variables that Kubernetes sets in every
// container for a Service that is called as the program is.
var ofKubernetes = regexp.MustCompile(`^(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)$`)

// load overlays cfg, which holds the defaults, with a file (if named), the
// environment and the flags that were given, in this order. A key that nothing has
// is an error that names it and where it stands.
func load(cfg any, path, envPrefix string, environ func() []string, flags *pflag.FlagSet) error {
	var keys []string
	for _, f := range fields(reflect.ValueOf(cfg).Elem(), "") {
		keys = append(keys, f.key)
	}
	k := koanf.New(".")
	if path != "" {
		if err := k.Load(file.Provider(path), yaml.Parser()); err != nil {
			return fmt.Errorf("configuration file %s: %w", path, err)
		}
		if err := unknown(k, keys); err != nil {
			return fmt.Errorf("configuration file %s: %w", path, err)
		}
	}
	vars := koanf.New(".")
	err := vars.Load(env.Provider(".", env.Opt{
		Prefix:      envPrefix,
		EnvironFunc: environ,
		TransformFunc: func(name, value string) (string, any) {
			name = strings.TrimPrefix(name, envPrefix)
			if ofKubernetes.MatchString(name) {
				return "", nil
			}
			return strings.ReplaceAll(strings.ToLower(name), "__", "."), value
		},
	}), nil)
	if err == nil {
		err = unknown(vars, keys)
	}
	if err != nil {
		return fmt.Errorf("environment variables %s*: %w", envPrefix, err)
	}
	if err := k.Merge(vars); err != nil {
		return err
	}
	given := koanf.New(".")
	if err := given.Load(posflag.ProviderWithFlag(flags, ".", nil, func(f *pflag.Flag) (string, any) {
		if !f.Changed || !slices.Contains(keys, f.Name) {
			return "", nil
		}
		return f.Name, posflag.FlagVal(flags, f)
	}), nil); err != nil {
		return err
	}
	if err := k.Merge(given); err != nil {
		return err
	}
	if err := decode(k, cfg); err != nil {
		return err
	}
	return checkListens(fields(reflect.ValueOf(cfg).Elem(), ""))
}

// checkListens returns an error for keys that name one address to listen on twice. A
// process listens on all at once.
func checkListens(all []field) error {
	type listen struct{ key, host, port string }
	var seen []listen
	var errs []error
	for _, f := range all {
		address, ok := f.value.Interface().(string)
		if !ok || !strings.HasSuffix(f.key, "listen") {
			continue
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			continue // Validate says so
		}
		for _, s := range seen {
			if s.port == port && (s.host == host || allInterfaces(s.host) || allInterfaces(host)) {
				errs = append(errs, fmt.Errorf("%s: %s is taken by %s: want another port", f.key, address, s.key))
			}
		}
		seen = append(seen, listen{f.key, host, port})
	}
	return errors.Join(errs...)
}

// allInterfaces reports whether to listen at a host is to listen at every one.
func allInterfaces(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// unknown returns an error that names the keys that a configuration does not have.
func unknown(k *koanf.Koanf, keys []string) error {
	var errs []error
	for _, have := range k.Keys() {
		if !slices.Contains(keys, have) {
			errs = append(errs, fmt.Errorf("unknown key %q", have))
		}
	}
	return errors.Join(errs...)
}

func decode(k *koanf.Koanf, cfg any) error {
	return k.UnmarshalWithConf("", cfg, koanf.UnmarshalConf{Tag: "yaml", DecoderConfig: &mapstructure.DecoderConfig{
		DecodeHook:       mapstructure.ComposeDecodeHookFunc(exact, mapstructure.StringToTimeDurationHookFunc(), mapstructure.StringToSliceHookFunc(",")),
		Result:           cfg,
		TagName:          "yaml",
		Squash:           true,
		ErrorUnused:      true,
		WeaklyTypedInput: true,
		ZeroFields:       true,
	}})
}

// exact refuses values that weak typing would make something else of. It stays weak
// because the environment has nothing but text.
func exact(from, to reflect.Value) (any, error) {
	v := from.Interface()
	text, isText := v.(string)
	_, isBool := v.(bool)
	_, isDuration := v.(time.Duration)
	switch {
	case to.Type() == reflect.TypeFor[time.Duration]():
		if !isText && !isDuration && !from.IsZero() {
			return nil, fmt.Errorf("%v has no unit: want for example %[1]vs", v)
		}
	case to.Kind() == reflect.String:
		if !isText {
			return nil, fmt.Errorf("%v is no text: put it in quotes", v)
		}
		if strings.TrimSpace(text) != text {
			return nil, fmt.Errorf("%q begins or ends with white space", text)
		}
	case (to.CanInt() || to.CanFloat()) && isBool:
		return nil, fmt.Errorf("%v is no number", v)
	case to.CanInt() && from.CanFloat() && from.Float() != math.Trunc(from.Float()):
		return nil, fmt.Errorf("%v is no whole number", v)
	}
	return v, nil
}
