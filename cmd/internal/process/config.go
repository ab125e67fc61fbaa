// Package process is what kvnode and kvorch have in common as programs: reading
// their configuration, logging, and the shape of their command lines. Only it
// reads flags, files and the environment.
package process

import (
	"errors"
	"fmt"
	"reflect"
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
			return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, envPrefix)), "__", "."), value
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
	return decode(k, cfg)
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
		DecodeHook:       mapstructure.ComposeDecodeHookFunc(mapstructure.StringToTimeDurationHookFunc(), mapstructure.StringToSliceHookFunc(",")),
		Result:           cfg,
		TagName:          "yaml",
		Squash:           true,
		ErrorUnused:      true,
		WeaklyTypedInput: true,
		ZeroFields:       true,
	}})
}
